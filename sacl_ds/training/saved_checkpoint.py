"""The model's weights in a checkpoint of any ZeRO stage, read by one process without an engine."""

from __future__ import annotations

import io
import json
import pickle
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from sacl_ds.errors import UserError
from sacl_ds.training.checkpoint import STATE, RunState

_MODULE = "mp_rank_00_model_states.pt"  # at stages 0 to 2, all of the module
_PREFIX = "model."  # the objective's name for the model


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], RunState]:
    """RUN/checkpoints/step_N -> the model's state in fp32 on the CPU, as `SaclModel` names it, and where the run stood.

    Raises UserError where the folder holds no complete checkpoint. Reads pickles, as DeepSpeed writes them: only for
    checkpoints that one trusts.
    """
    try:
        state = RunState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{folder} holds no complete checkpoint (no {STATE}); give RUN/checkpoints/step_N, or a finished run"
        ) from None
    try:
        weights = _sharded(folder) if state.zero_stage == 3 else _whole(folder)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint {folder} cannot be read: {reason}; take another one of this run") from error
    return {
        name.removeprefix(_PREFIX): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if name.startswith(_PREFIX)
    }, state


def _whole(folder: Path) -> dict[str, Tensor]:
    # DeepSpeed keeps objects of its own beside the tensors
    return torch.load(folder / _MODULE, map_location="cpu", weights_only=False)["module"]


def _sharded(folder: Path) -> dict[str, Tensor]:
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
