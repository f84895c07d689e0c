"""Image-text matching: hard negatives drawn from the similarity, and the loss over matched and unmatched pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_ds.distributed import Group
from sacl_ds.losses.reduction import global_mean


@torch.no_grad()
def sample_negatives(
    logits: Tensor,
    pair_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    hardness: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """For each row draw a column with probability proportional to e^(hardness * logit).

    hardness: 1 draws as ALBEF does, 0 evenly. logits: (n, n) scaled similarities of this rank's pairs; row i's own
    column i is never drawn, nor one that shares an id. pair_ids: (n,) or (n, k) int64. Returns (n,) int64 columns and
    (n,) bool: False where a row has no negative (its column then means nothing). Gumbel-max: exact, vectorised, no
    host sync.
    """
    n = len(logits)
    excluded = torch.eye(n, dtype=torch.bool, device=logits.device)
    if pair_ids is not None:
        ids = pair_ids.view(n, -1)
        excluded = excluded | (ids[:, None, :] == ids[None, :, :]).any(-1)
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float64)
    gumbel = -(-uniform.clamp(min=1e-300).log()).log()
    noisy = (hardness * logits.double() + gumbel).masked_fill(excluded, -torch.inf)
    return noisy.argmax(1), ~excluded.all(1)


def matching_loss(logits: Tensor, matched: Tensor, valid: Tensor, group: Group = None) -> Tensor:
    """Cross-entropy over pairs: mean over the valid pairs of all ranks (see `global_mean`).

    logits: (n, 2), index 1 means matched; matched: (n,) bool; valid: (n,) bool.
    """
    values = torch.nn.functional.cross_entropy(logits.float(), matched.long(), reduction="none")
    return global_mean(values, valid.to(values.dtype), group)
