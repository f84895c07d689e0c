"""Masked language modelling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sacl_ds.distributed import Group
from sacl_ds.losses.reduction import global_mean


def masked_language_loss(
    logits: Tensor,
    labels: Tensor,
    group: Group = None,
    soft: Tensor | None = None,
    soft_weight: float = 0.0,
    total: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over predicted tokens: mean over those of all ranks, or over `total` of them (see `global_mean`); 0
    where there are none.

    logits: (n, vocabulary); labels: (n,) int64, the original tokens. n may differ between ranks and be 0.
    soft: (n, vocabulary) logits of the momentum model, without gradient: (1 - soft_weight) of the loss is about the
    labels, soft_weight about its distribution.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = cross_entropy(logits, labels, reduction="none")
    if soft is not None and soft_weight:
        believed = cross_entropy(logits, soft.detach().to(logits.dtype).softmax(1), reduction="none")
        values = (1 - soft_weight) * values + soft_weight * believed
    return global_mean(values, torch.ones_like(values), group, total)
