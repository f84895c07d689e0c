"""Tensors from a checkpoint file, whatever wraps them; nothing in a file is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sacl_ds.errors import UserError
from sacl_ds.model.starts.torchscript import is_torchscript, read_torchscript

_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


@dataclass(frozen=True)
class WeightsFile:
    tensors: dict[str, Tensor]  # by name, without a 'module.' that all of them have
    torchscript: bool  # an archive as OpenAI publishes CLIP


def read_weights(path: str, setting: str) -> WeightsFile:
    """A .safetensors file, one of torch.save (a state dict, also inside 'state_dict' or 'model'), or TorchScript.

    setting: what error lines call it. Raises UserError where it is not there or holds no state dict.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{setting}={path}: no such file; correct the path")
    torchscript = False
    try:
        torchscript = is_torchscript(file)
        if torchscript:
            loaded: Any = read_torchscript(file)
        elif file.suffix == ".safetensors":
            loaded = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if torchscript:
            raise UserError(
                f"{setting}={path}: a TorchScript archive that is damaged or more than weights ({error}); "
                "fetch it again, or give the state dict of its model"
            ) from None
        raise UserError(
            f"{setting}={path}: it holds objects other than tensors, which may run code when loaded; if you trust "
            "it, keep its weights: torch.save({'model': torch.load(FILE, weights_only=False)['model']}, NEW)"
        ) from None
    except Exception as error:  # a damaged file makes its reader raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{setting}={path} cannot be read: {reason}; fetch it again") from None
    tensors = _tensors(loaded)
    if not tensors:
        raise UserError(f"{setting}={path}: no state dict in it; give a file of names and tensors")
    return WeightsFile(tensors, torchscript)


def _tensors(loaded: Any) -> dict[str, Tensor]:
    for _ in _WRAPPERS:  # one in another, each at most once
        if isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
            loaded = next((loaded[key] for key in _WRAPPERS if key in loaded), None)
    if not isinstance(loaded, Mapping):
        return {}
    found = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return found
