"""Padded texts as their real tokens alone, one behind another, so that padding is not computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Which tokens of n texts, padded to `length`, are computed.

    places: (T,) int64, their ascending places among the n * length, none twice; None: all of them. T is the shape of a
    tensor and so known on the host: nothing here waits for the device.
    """

    rows: int
    length: int
    places: Tensor | None = None

    @classmethod
    def of(cls, texts: Tensor, places: Tensor | None) -> Packing:
        """Of texts like these, (n, length)."""
        rows, length = texts.shape
        everything = places is None or len(places) == rows * length
        return cls(rows, length, None if everything else places)

    def pack(self, states: Tensor) -> Tensor:
        """(n, length, ...) -> (T, ...), without a copy where all are computed."""
        flat = states.flatten(0, 1)
        return flat if self.places is None else _Pack.apply(flat, self.places)

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (n, length, ...), 0 at the places that are not computed."""
        if self.places is None:
            flat = packed
        else:
            room = packed.new_zeros(self.rows * self.length, *packed.shape[1:])
            flat = room.index_copy_(0, self.places, packed)
        return flat.unflatten(0, (self.rows, self.length))

    def positions(self, device: torch.device) -> Tensor:
        """(T,) int64: where in its text each computed token stands, from 0."""
        if self.places is None:
            return torch.arange(self.length, device=device).repeat(self.rows)
        return self.places % self.length


class _Pack(torch.autograd.Function):
    """index_select, whose gradient PyTorch adds row by row, since a row might be selected twice; here none is."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(flat)
        return flat.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        room = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return room.index_copy_(0, places, gradient), None
