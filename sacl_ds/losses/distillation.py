"""Soft targets: what the momentum model takes a pair to belong to, beside the pair itself (as in ALBEF).

For image anchor i with keys k_j, the candidates C(i) are its own key and its negatives' (pairs that share an id with i
are neither), v_i' is the momentum model's feature of image i, and the logit scale the trained model's, constant in q:

    q_ij = softmax over C(i) of logit_scale * <v_i', k_j>         p_ij = softmax over C(i) of z_ij
    S_i  = -sum_j q_ij log p_ij = L_i + z_ii - logit_scale * <v_i, kappa_i>,    kappa_i = sum_j q_ij k_j

with L_i InfoNCE against the same keys. So all that soft targets add is kappa_i, one vector an anchor, which needs no
gradient: an attention over the candidates, summed up tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sacl_ds.losses.tiles import Excluded, Side, tiles_of

TILE = (1024, 1024)


@torch.no_grad()
def expected_keys(anchors: Side, keys: Sequence[Side], logit_scale: Tensor) -> Tensor:
    """(b, d) kappa_i: the mean key of each anchor's candidates under the momentum model's softmax.

    anchors: (b, d) momentum features of this rank's pairs; keys: the global batch's, which hold the anchors' own at
    anchors.first, and perhaps a queue's. Float32 or float64, alike. No more than a tile of logits is held.
    """
    assert anchors.first is not None
    own = keys[0].part(anchors.first, anchors.first + len(anchors)).features
    # of the candidates so far, the own key the first: the highest logit, and relative to it the softmax's sums
    highest = logit_scale * (anchors.features * own).sum(1)
    total, weighted = torch.ones_like(highest), own.clone()
    for side in keys:
        for i, _, row, column in tiles_of(anchors, side, TILE):
            part = slice(i, i + len(row))
            logits = (row.features @ column.features.T).mul_(logit_scale)
            Excluded(row, column).fill(logits, -torch.inf)
            top = torch.maximum(highest[part], logits.amax(1))
            shrink = (highest[part] - top).exp_()
            weights = logits.sub_(top[:, None]).exp_()
            total[part] = total[part] * shrink + weights.sum(1)
            weighted[part] = torch.addmm(weighted[part] * shrink[:, None], weights, column.features)
            highest[part] = top
    return weighted.div_(total[:, None])
