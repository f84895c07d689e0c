"""Masked language modelling."""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_ds.distributed import Group
from sacl_ds.losses.reduction import global_mean


def masked_language_loss(logits: Tensor, labels: Tensor, group: Group = None) -> Tensor:
    """Cross-entropy over predicted tokens: mean over those of all ranks (see `global_mean`); 0 where there are none.

    logits: (n, vocabulary); labels: (n,) int64, the original tokens. n may differ between ranks and be 0.
    """
    values = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return global_mean(values, torch.ones_like(values), group)
