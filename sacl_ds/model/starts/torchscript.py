"""Reading of a TorchScript archive's tensors, as OpenAI publishes CLIP, without running what is in it.

`torch.jit.load` runs a module's own `__setstate__`, which may write to any file. Here the archive's `data.pkl` is read
with stand-ins for all that it names: records for modules, and the tensors that lie in `data/`.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
            return _tensors(module) if isinstance(module, _Record) else {}
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


def _tensors(module: Any) -> dict[str, Tensor]:
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
