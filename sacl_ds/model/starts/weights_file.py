"""Tensors from a checkpoint file, whatever wraps them; nothing in a file is run."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sacl_ds.errors import UserError

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
    torchscript = _is_torchscript(file)
    try:
        if torchscript:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.jit has no successor that reads these
                loaded: Any = torch.jit.load(str(file), map_location="cpu").state_dict()
        elif file.suffix == ".safetensors":
            loaded = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise UserError(
            f"{setting}={path}: it holds objects other than tensors, which may run code when loaded; if you trust "
            "it, keep its weights: torch.save({'model': torch.load(FILE, weights_only=False)['model']}, NEW)"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{setting}={path} cannot be read: {reason}; fetch it again") from None
    tensors = _tensors(loaded)
    if not tensors:
        raise UserError(f"{setting}={path}: no state dict in it; give a file of names and tensors")
    return WeightsFile(tensors, torchscript)


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _tensors(loaded: Any) -> dict[str, Tensor]:
    while isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
        inner = next((loaded[key] for key in _WRAPPERS if key in loaded), None)
        if inner is None:
            return {}
        loaded = inner
    if not isinstance(loaded, Mapping):
        return {}
    found = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return found
