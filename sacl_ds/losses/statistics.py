"""Mutual information of the pairs under the regulated loss, for a log: means over all anchors of all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sacl_ds.distributed import sum_over_ranks
from sacl_ds.losses.streaming import Anchors, Joint, sums_over_ranks
from sacl_ds.losses.tiles import Excluded, Similarities, Sums, tiles_of, wide

_TILE = 1024, 1024
# sums that each rank contributes
_NAMES = (
    "anchors", "pairs", "with_negatives", "pmi_positive", "pmi_negative", "pmi_negative_target", "infonce_bound",
    "negative_mass_log",
)  # fmt: skip
_PER = {
    "pmi_positive": "anchors",
    "infonce_bound": "anchors",
    "negative_mass_log": "with_negatives",
    "pmi_negative": "pairs",
    "pmi_negative_target": "pairs",
}


@torch.no_grad()
def contrastive_statistics(joint: Joint) -> dict[str, Tensor]:
    """0-dim float64 tensors, equal on all ranks; takes one more pass over the tiles.

    The critic's pointwise mutual information is PMI_ij = z_ij + log w_ij - log mean_k (w_ik e^z_ik), with w_ii = 1 and
    k over the anchor's positive and negatives. `pmi_positive`, `pmi_negative`: its means over positives and over pairs
    of anchor and negative. `pmi_negative_target`: mean log(1/w), which the paper's heuristic says pmi_negative
    approaches. `infonce_bound`: log(1 + negatives) - InfoNCE loss. `negative_mass_log`: what the weights add to the
    log-sum of the negatives. `negatives`: per anchor.
    """
    (plain_images, plain_texts), of_pairs = _second_pass(joint)
    images = _of_anchors(joint, joint.image_anchors, joint.of_images, plain_images, of_pairs[0])
    texts = _of_anchors(joint, joint.text_anchors, joint.of_texts, plain_texts, of_pairs[1])
    total = dict(zip(_NAMES, sum_over_ranks(images + texts, joint.job.group), strict=True))
    means = {name: total[name] / total[base].clamp(min=1) for name, base in _PER.items()}
    return means | {"negatives": total["pairs"] / total["anchors"].clamp(min=1)}


def _second_pass(joint: Joint) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Log-sums of z of this rank's images and texts over their negatives; and (2, 2) float64: for images and for texts
    as anchors, the sums of z and of r over the pairs of anchor and negative that this rank has seen."""
    images, texts = (side.to(wide(side.features)) for side in (joint.images, joint.texts))
    similarities = Similarities(joint.job.regulation, _TILE, images, texts, float(joint.logit_scale))
    plain = [Sums.empty(len(side), images.features.device) for side in (images, texts)]
    of_pairs = torch.zeros(2, 2, dtype=torch.float64, device=images.features.device)
    for i, j, row, column in tiles_of(images, texts, _TILE):
        z, r = similarities.logarithms(row, column)
        Excluded(row, column).fill(r, -torch.inf)
        for direction, (start, dim) in enumerate(((i, 1), (j, 0))):
            stays = r > -torch.inf
            if joint.kept is not None:
                some = joint.kept.part(slice(i, i + len(row)), slice(j, j + len(column)))
                stays &= r >= (some.rows[:, None] if dim else some.columns).to(r.dtype)
            lse = z.masked_fill(~stays, -torch.inf).logsumexp(dim).double()
            nothing = torch.zeros_like(lse)
            plain[direction].add(Sums(lse, nothing - torch.inf, nothing), start)
            of_pairs[direction] += torch.stack([x.masked_fill(~stays, 0.0).sum(dtype=torch.float64) for x in (z, r)])
    of_texts = sums_over_ranks(plain[1], wide(images.features), joint.job.group).part(joint.job.start, len(images))
    return (plain[0].weighted, of_texts.weighted), of_pairs


def _of_anchors(joint: Joint, anchors: Anchors, sums: Sums, plain: Tensor, of_pairs: Tensor) -> Tensor:
    regulation, own, n = joint.job.regulation, joint.own, sums.count
    has = n > 0
    regulated = anchors.margin + own
    log_mean = torch.logaddexp(own, regulated) - n.log1p()
    log_w = n.sum() * math.log(regulation.negative_mass)
    if regulation.drop_below is None and not regulation.even:
        log_w = log_w + of_pairs[1] + (n * (n.log() - sums.normaliser)).masked_fill(~has, 0.0).sum()
    return torch.stack(
        [
            torch.full_like(log_w, len(own)),
            n.sum(),
            has.sum().double(),
            (own - log_mean).sum(),
            of_pairs[0] + log_w - (n * log_mean).sum(),
            -log_w,
            (n.log1p() - softplus(plain - own)).sum(),
            (regulated - plain).masked_fill(~has, 0.0).sum(),
        ]
    )
