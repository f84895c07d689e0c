"""Trained model on disk: model.safetensors, config.yaml and tokenizer/ in a run directory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sacl_ds.config import ModelConfig, RunConfig, TrainingConfig
from sacl_ds.config_file import read_yaml, resolve_layers
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.files import require_unchanged, seal, unseal
from sacl_ds.model.placing import fill, require_weights
from sacl_ds.model.sacl import SaclModel

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.yaml", "tokenizer"


def save_weights(state: dict[str, Tensor], folder: Path, step: int) -> None:
    """Write all weights under `folder`, atomically: a reader sees the old file or the new one."""
    write_tensors(state, folder / WEIGHTS, {"format": "pt", "sacl_ds": json.dumps({"step": step})})


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    temporary = path.with_name(f".{path.name}.writing")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_tensors(path: Path, label: str) -> dict[str, Tensor]:
    """Read a safetensors file. label: what error lines begin with. Raises UserError where it cannot be read."""
    require_weights(path, label)
    try:
        return load_file(path)
    except Exception as error:  # a damaged header makes the library raise more than its own error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{label}: {path.name} cannot be read: {reason}") from None


def begin_run(run: TrainingConfig, folder: Path) -> None:
    """Write the configuration of a run that begins or goes on; what a finished one sealed there is open again."""
    unseal(folder)
    run.save(folder / CONFIG)


def seal_run(folder: Path, *more: str) -> None:
    """Write the checksums of a finished run's configuration, weights and tokenizer, and of the files `more`.

    Raises OSError.
    """
    seal(folder, (CONFIG, WEIGHTS, TOKENIZER, *more))


def finished_weights(folder: Path, label: str) -> dict[str, Tensor]:
    """Read a finished run's weights. label: what error lines begin with. Raises UserError where they were changed."""
    require_unchanged(folder, label, WEIGHTS)
    return read_tensors(folder / WEIGHTS, label)


def load_model(
    folder: str | Path, setting: str, state: Mapping[str, Tensor] | None = None
) -> tuple[SaclModel, RunConfig, Tokenizer]:
    """Load a finished run's model, its configuration and its tokenizer; `setting` is what error lines name.

    state: the weights, where they are not the folder's own (those of a checkpoint in it). Raises UserError where the
    folder holds no finished run, or weights of another model.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, TOKENIZER) if state is None else (CONFIG, TOKENIZER):
        if not (folder / name).exists():
            raise UserError(f"{setting}={folder}: no {name} there; give the directory of a finished run")
    run = _run_config(folder, setting)
    tokenizer = Tokenizer.load(folder / TOKENIZER, run.model.max_tokens)
    model = SaclModel(run.model, tokenizer.size, pretrained=False)
    weights = finished_weights(folder, f"{setting}={folder}") if state is None else state
    fill(model, weights, f"{setting}={folder}", f": {WEIGHTS} does not fit its {CONFIG}")
    return model, run, tokenizer


def saved_model_config(folder: Path) -> ModelConfig:
    """Read the section `model` of the run in `folder`, of whatever kind it is. Raises UserError."""
    return _model_config(folder, read_yaml(folder / CONFIG))


def _model_config(folder: Path, values: dict[str, Any]) -> ModelConfig:
    return resolve_layers([(f"in {folder / CONFIG}", {"model": values.get("model", {})})], TrainingConfig).model


def _run_config(folder: Path, setting: str) -> RunConfig:
    """Read the configuration of a pre-training run, or of one fine-tuned for retrieval, whose model is the same."""
    values = read_yaml(folder / CONFIG, f"{setting}={folder}")
    task = values.get("task")
    if task is None:
        return resolve_layers([(f"in {folder / CONFIG}", values)], RunConfig)
    if task != "retrieval":
        raise UserError(f"{setting}={folder}: a run fine-tuned for {task}; give one of pre-training or retrieval")
    return RunConfig(model=_model_config(folder, values))


def identity_of(model: nn.Module, *more: str) -> str:
    """Hash (SHA-256) the weights and whatever else decides the model's output for a sample."""
    digest = hashlib.sha256("\n".join(more).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
