"""Means over the global batch that differentiate exactly under an engine that averages gradients over ranks."""

from __future__ import annotations

from torch import Tensor

from sacl_ds.distributed import Group, sum_over_ranks, world_size


def global_mean(values: Tensor, weights: Tensor, group: Group = None) -> Tensor:
    """world * sum(values * weights on this rank) / sum(weights on all ranks), 0-dim; 0 where all weights are 0.

    values, weights: same shape, float; ranks may hold different numbers. The mean over ranks of this value, and of
    its gradients, is that of one process that holds everything.
    """
    total = sum_over_ranks(weights.sum(), group)
    return world_size(group) * (values * weights).sum() / total.clamp(min=1e-12)
