"""Reading of a DeepSpeed JSON file, and checks of its sections' types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sacl_ds.errors import UserError

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "comet": "comet_ml"}  # and packages
_SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "optimizer",
    "optimizer.params", "bf16", "fp16", "torch_autocast", *MONITORS,
)  # fmt: skip
_MAY_BE_NULL = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_DEEPEST = 20  # sections in sections


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read the file without resolving it. Raises UserError where it cannot be read, is no JSON object or names a key
    twice."""
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except OSError as error:
        raise UserError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not valid JSON: {said}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object")
    return loaded


def check_sections(ds: dict[str, Any], name: str) -> None:
    """Raises UserError for a section that is no object, a ZeRO stage that there is not, and endless nesting."""
    _check_depth(ds, name, 0)
    for section in _SECTIONS:
        value: Any = ds
        for part in section.split("."):
            value = value.get(part, {}) if isinstance(value, dict) else {}
        if not isinstance(value, dict) and not (value is None and section in _MAY_BE_NULL):
            raise UserError(f"{name}: {section} is an object of DeepSpeed's, {{...}}, not {repr(value)[:80]}")
        device = (value or {}).get("device", "none") if section in _MAY_BE_NULL else "none"
        if device not in ("none", "cpu", "nvme"):
            raise UserError(f'{name}: {section}.device={repr(device)[:80]}; write "cpu", "nvme" or "none"')
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"{name}: zero_optimization.stage={repr(stage)[:80]}; choose 0, 1, 2 or 3")


def _check_depth(value: Any, name: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise UserError(f"{name}: more than {_DEEPEST} objects within each other")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, name, depth + 1)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(each for each in names if names.count(each) > 1)!r} stands twice in one object"
        )
    return made
