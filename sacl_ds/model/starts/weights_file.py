"""Reading of tensors from a checkpoint file, whatever wraps them; nothing in a file is run."""

from __future__ import annotations

import io
import math
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

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_MOST_MODULES = 10_000


def is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """Read {dotted name: tensor} of the modules' tensors. Raises UnpicklingError where it holds anything but modules,
    numbers, texts, lists and tensors, or is damaged."""
    with zipfile.ZipFile(file) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix(
            "constants.pkl"
        )
        try:
            module = _Reader(archive, root).load()
            return _tensors_of_pickle(module) if isinstance(module, _Record) else {}
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


def _tensors_of_pickle(module: Any) -> dict[str, Tensor]:
    """Collect a module's tensors, level by level. Raises UnpicklingError for modules within themselves, which would
    never end."""
    found: dict[str, Tensor] = {}
    level, seen = [("", module)], 0
    while level:
        seen += len(level)
        if seen > _MOST_MODULES:
            raise pickle.UnpicklingError(f"more than {_MOST_MODULES} modules")
        inner = [(f"{prefix}{name}", value) for prefix, each in level for name, value in vars(each).items()]
        found.update((name, value) for name, value in inner if isinstance(value, Tensor))
        level = [(f"{name}.", value) for name, value in inner if isinstance(value, _Record)]
    return found


class _Record:
    """Stand-in for every module and every other pickled object; keeps its attributes."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):  # else one with a __setstate__ of its own, which is not run
            vars(self).update({str(name): value for name, value in state.items()})


class _Anything:
    """Stand-in for every pickled function. Has no attributes that a pickle could set."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        return arguments[0] if arguments else None


class _Rebuild(_Anything):
    """Safe stand-in for `torch._utils._rebuild_tensor_v2`."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Tensor:
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, Tensor) or math.prod(size) > len(storage):
            raise pickle.UnpicklingError("a tensor that is larger than its data")
        return torch.as_strided(storage, size, stride, offset)


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(_stored(archive, f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return type(name, (_Record,), {})
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("collections", "OrderedDict") or module == "torch.jit._pickle":
            return _Anything()
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage as a flat tensor. pid: ('storage', its type, its key, device, values)."""
        _, kind, key, _, count = pid
        if key not in self._storages:
            data = bytearray(_stored(self._archive, f"{self._root}data/{key}"))
            dtype = _DTYPES[kind]
            if len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"data/{key} is damaged")
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a part of the archive. Never compressed, so that it takes no more memory than the file."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is compressed")
    return archive.read(name)


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
