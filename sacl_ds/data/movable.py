"""Batches on a device: what all dataclasses of tensors share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Movable")


def part_of(batch: Any, rows: slice, texts: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Fields of a batch's rows: texts cut to the longest that is left, faults left with the whole.

    texts: for each mask of tokens, (b, L), the fields that have its places.
    """
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    cut = {name: value[rows] for name, value in values.items() if value is not None} | {"faults": []}
    for mask, others in texts.items():
        if mask in cut:
            longest = int(cut[mask].sum(1).max())
            cut |= {name: cut[name][:, :longest].contiguous() for name in (mask, *others) if name in cut}
    return cut


class Movable:
    """Base of a frozen dataclass, some of whose fields are tensors."""

    def to(self: Self, device: torch.device) -> Self:
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: Self) -> Self:
        """In page-locked memory, from which copies to a GPU do not wait; what lies on a GPU stays there."""
        return self._mapped(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of what lies on a GPU until all that `stream` was given so far is done."""
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(stream)

    def _mapped(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)  # type: ignore[type-var]
