"""Means over the global batch that differentiate exactly under an engine that averages gradients over ranks."""

from __future__ import annotations

from torch import Tensor

from sacl_ds.distributed import Group, sum_over_ranks, world_size


def global_mean(values: Tensor, weights: Tensor, group: Group = None, total: Tensor | None = None) -> Tensor:
    """world * sum(values * weights on this rank) / sum(weights on all ranks), 0-dim; 0 where all weights are 0.

    values, weights: same shape, float; ranks may hold different numbers. The mean over ranks of this value, and of
    its gradients, is that of one process that holds everything. total: 0-dim, the sum of all weights, where the values
    of a step come in several calls: then these add up to the mean, and nothing is communicated.
    """
    if total is None:
        total = sum_over_ranks(weights.sum(), group)
    return world_size(group) * (values * weights).sum() / total.clamp(min=1e-12)
