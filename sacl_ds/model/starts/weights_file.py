"""Reading of tensors from a checkpoint file, whatever wraps them; nothing in a file is run."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sacl_ds.errors import UserError
from sacl_ds.model.placing import require_weights
from sacl_ds.model.starts.torchscript import is_torchscript, read_torchscript

_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
_WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # wherever they stand in a name
_MODULE = "module."  # of DataParallel and DDP: before all names


@dataclass(frozen=True)
class WeightsFile:
    tensors: dict[str, Tensor]  # by name, without what torch.compile, DDP and FSDP put into names
    torchscript: bool  # an archive as OpenAI publishes CLIP


def read_weights(path: str, setting: str) -> WeightsFile:
    """Read a .safetensors file, one of torch.save (a state dict, also inside 'state_dict' or 'model'), or TorchScript.

    setting: what error lines call it. Raises UserError where it is not there or holds no state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{setting}={path}: no such file; correct the path")
    require_weights(file, f"{setting}={path}")
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
        if not _names_objects(file, error):
            raise UserError(f"{setting}={path} cannot be read: it is no file of torch.save; fetch it again") from None
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
    return WeightsFile(_plain(tensors, f"{setting}={path}"), torchscript)


def is_wrapped(name: str) -> bool:
    """Return whether a name shows that weights lie one level deeper, or that a model wrapper has named them."""
    return name in _WRAPPERS or name.startswith(_MODULE) or any(part in name for part in _WRAPPED)


def _names_objects(file: Path, error: pickle.UnpicklingError) -> bool:
    """Return whether torch.load refused what a pickle asks for, rather than failed to read the file."""
    with file.open("rb") as opened:
        pickled = opened.read(1) == pickle.PROTO or zipfile.is_zipfile(file)
    return pickled and re.search("GLOBAL|Can only (build|create)", str(error)) is not None


def _tensors(loaded: Any) -> dict[str, Tensor]:
    for _ in _WRAPPERS:  # one in another, each at most once
        if isinstance(loaded, Mapping):
            inner = (loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping))
            loaded = next(inner, loaded)
    if not isinstance(loaded, Mapping):
        return {}
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _plain(tensors: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """Strip the prefixes that model wrappers add to names. Raises UserError where two names become one."""
    names = list(tensors)
    for part in _WRAPPED:
        names = [name.replace(part, "") for name in names]
    while all(name.startswith(_MODULE) for name in names):
        names = [name.removeprefix(_MODULE) for name in names]
    found: dict[str, Tensor] = {}
    for name, tensor in zip(names, tensors.values(), strict=True):
        if name in found:
            raise UserError(f"{label}: it holds {name} twice, with and without a wrapper's name; give one of the two")
        found[name] = tensor
    return found
