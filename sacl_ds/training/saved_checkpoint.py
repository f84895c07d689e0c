"""The model's weights in a checkpoint of any ZeRO stage and any number of ranks, read by one process without an
engine."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sacl_ds.errors import UserError
from sacl_ds.training.checkpoint_folder import (
    STATE,
    RunState,
    frozen_tensors,
    read_manifest,
    read_state,
    trained_weights,
    verify,
)

_PREFIX = "model."  # the objective's name for the model


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], RunState]:
    """Read RUN/checkpoints/step_N: the model's state in fp32 on the CPU, as `SaclModel` names it, and the run's state.

    Raises UserError where the folder holds no complete checkpoint, or a damaged one. No pickle is read.
    """
    try:
        state = read_state(folder)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no complete checkpoint (no {STATE}); give RUN/checkpoints/step_N, or a finished run"
        ) from None
    manifest = read_manifest(folder)
    verify(folder, sorted(manifest.files), manifest)
    weights = trained_weights(folder, manifest) | frozen_tensors(folder, manifest)
    return {
        name.removeprefix(_PREFIX): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if name.startswith(_PREFIX)
    }, state
