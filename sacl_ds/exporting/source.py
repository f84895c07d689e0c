"""Source of an export: the model of a run, and what the run's files say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sacl_ds.checksums import require_unchanged
from sacl_ds.config import RunConfig
from sacl_ds.config_file import read_yaml
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import CONFIG, WEIGHTS, load_model
from sacl_ds.tasks.configuration import run_of
from sacl_ds.tasks.weights import saved_state
from sacl_ds.telemetry.metrics import METRICS, read

_BEST = "best.json"


@dataclass(frozen=True)
class ExportSource:
    label: str  # what error lines begin with
    folder: Path  # of the run
    model: SaclModel  # on the CPU, float32, eval
    run: RunConfig  # model and, for a pre-training run, everything else
    settings: Mapping[str, Any]  # config.yaml as it stands, of any kind of run
    tokenizer: Tokenizer
    step: int | None  # of the weights, where that is told
    figures: dict[str, float]  # of the last evaluation up to that step; of the best weights where those are kept
    chance: dict[str, float]


def read_source(checkpoint: str) -> ExportSource:
    """Read a finished run, its checkpoints/step_N (of any ZeRO stage), or an earlier export. Raises UserError."""
    label, folder = f"checkpoint={checkpoint}", run_of(checkpoint)
    state, step = saved_state(checkpoint)
    model, run, tokenizer = load_model(folder, "checkpoint", state)
    whole = step is None
    if step is None:
        step = _step(folder / WEIGHTS)
    figures, chance = _evaluated(folder, step, whole)
    settings = read_yaml(folder / CONFIG)
    return ExportSource(label, folder, model.eval(), run, settings, tokenizer, step, figures, chance)


def _step(weights: Path) -> int | None:
    """Read the step that `save_weights` noted in the file, or None."""
    try:
        with safe_open(weights, "pt") as file:
            step = json.loads((file.metadata() or {}).get("sacl_ds", "{}")).get("step")
    except (OSError, ValueError, AttributeError, SafetensorError):
        return None
    return step if isinstance(step, int) else None


def _evaluated(folder: Path, step: int | None, best: bool) -> tuple[dict[str, float], dict[str, float]]:
    lines = [line for line in read(folder / METRICS) if isinstance(line.get("evaluation"), dict)]
    lines = [line for line in lines if step is None or line.get("step", 0) <= step]
    chance = _numbers(lines[-1].get("chance")) if lines else {}
    if best and (folder / _BEST).exists():
        require_unchanged(folder, str(folder), _BEST)
        try:
            return _numbers(json.loads((folder / _BEST).read_text()).get("figures")), chance
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / _BEST} cannot be read: {error}; put it right, or remove it") from None
    return (_numbers(lines[-1]["evaluation"]) if lines else {}), chance


def _numbers(values: object) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    return {str(name): float(value) for name, value in values.items() if isinstance(value, (int, float))}
