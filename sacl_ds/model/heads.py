"""Projections into the shared space, the learned temperature, and the matching head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sacl_ds.distributed import sum_over_ranks

MAX_LOGIT_SCALE = 100.0


class Projection(nn.Linear):
    """(b, width) [CLS] states -> (b, embed_dim) unit vectors, float32 (float64 for float64 states). No bias."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__(width, embed_dim, bias=False)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        projected = super().forward(states)
        return nn.functional.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)


class LogitScale(nn.Module):
    """1 / temperature, learned as its logarithm in float32 and kept in [1, 100].

    A plain clamp has no gradient past its bound, so a parameter that crosses it never returns. This one passes a
    gradient that points back inside.
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        # shape (1,): DeepSpeed cannot flatten a 0-dim parameter
        self.log_scale = nn.Parameter(torch.tensor([math.log(initial)], dtype=torch.float32))

    def forward(self) -> Tensor:
        """0-dim, between 1 and 100."""
        return _ClampWithReturn.apply(self.log_scale, 0.0, math.log(MAX_LOGIT_SCALE)).exp().squeeze(0)


class _ClampWithReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.low, ctx.high = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (value,) = ctx.saved_tensors
        # the direction of all ranks together: each alone may disagree, and their mean must equal one process's
        total = sum_over_ranks(gradient)
        outwards = ((value >= ctx.high) & (total < 0)) | ((value <= ctx.low) & (total > 0))
        return gradient.masked_fill(outwards, 0.0), None, None
