"""Batches on a device: what all dataclasses of tensors share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Movable")


class Movable:
    """Base of a frozen dataclass, some of whose fields are tensors."""

    def to(self: Self, device: torch.device) -> Self:
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: Self) -> Self:
        """In page-locked memory, from which copies to a GPU do not wait."""
        return self._mapped(Tensor.pin_memory)

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
