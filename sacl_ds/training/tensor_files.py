"""Tensors on disk as safetensors, written one after another, and reassembled from the fragments of many files.

The library's own writer wants all of them in memory at once, beside what is being trained; this one holds one at a time
and knows the file's checksum when it is done. Reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sacl_ds.errors import UserError
from sacl_ds.files import Written

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Tensor to be written; `read` gives it, on any device, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_entries(path: Path, entries: Iterable[Entry]) -> Written:
    """Write a safetensors file, flushed to the disk. Raises OSError where there is no room."""
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.size
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for entry in entries:
            tensor = entry.read().detach()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {entry}")
            if not entry.size:
                continue
            data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Written(8 + len(text) + end, digest.hexdigest())


def fragment_name(kind: str, name: str, start: int) -> str:
    """Return the name, in a file, of the elements of parameter `name` from `start` on, in row-major order."""
    return f"{kind}/{name}@{start}"


class Fragments:
    """Reader of flat tensors that several files hold in pieces, by range; no file is read whole.

    Raises UserError, naming the file, where one cannot be read.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    (length,) = file.get_slice(key).get_shape()
                    kind, _, rest = key.partition("/")
                    name, _, start = rest.rpartition("@")
                    self._pieces.setdefault((kind, name), []).append((int(start), length, file, key))
            except (OSError, SafetensorError, ValueError) as error:
                raise UserError(f"{path} cannot be read: {error}; take another checkpoint of this run") from None
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def holds(self, kind: str, name: str) -> bool:
        return (kind, name) in self._pieces

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Read (count,) elements from `start` on. Raises UserError where some are in no file."""
        parts, reached, end = [], start, start + count
        for begin, length, file, key in self._pieces.get((kind, name), []):
            if begin <= reached < min(begin + length, end):
                stop = min(begin + length, end)
                parts.append(file.get_slice(key)[reached - begin : stop - begin])
                reached = stop
        if reached < end:
            raise UserError(f"the checkpoint lacks {kind} {reached} to {end} of {name}; take another one of this run")
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Read all of those parameters."""
        return {
            name: self.read(kind, name, 0, int(torch.Size(shape).numel())).view(shape) for name, shape in shapes.items()
        }
