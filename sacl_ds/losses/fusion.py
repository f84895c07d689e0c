"""Losses of the fusion encoder: image-text matching with hard negatives, masked language modelling, global means."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sacl_ds.distributed import Group, sum_over_ranks, world_size
from sacl_ds.losses.regulated import Regulation
from sacl_ds.losses.streaming import ids_by_column


@dataclass(frozen=True)
class HardNegatives:
    """A text for each image and an image for each text: (b,) int64 indices in the batch, and (b,) bool whether there
    was one to draw; the index means nothing otherwise."""

    text: Tensor
    image: Tensor
    text_found: Tensor
    image_found: Tensor

    @property
    def valid(self) -> Tensor:
        """(3b,) bool, of pairings: the b pairs themselves, images with their texts, texts with their images."""
        return torch.cat([torch.ones_like(self.text_found), self.text_found, self.image_found])


@dataclass(frozen=True)
class Weighting:
    """The contrastive loss's weights of the negatives of b pairs, for the draw of hard ones.

    regulation: its settings. teacher: (image, text) features (b, d_t), needed where regulation.teacher.
    least_kept: `ContrastiveOutput.least_kept` of these pairs, needed with regulation.drop_below.
    keys: (image, text) momentum features (b, d) of these pairs where the loss compared with them (`Keys.image`,
    `Keys.text`); used with drop_below alone.

    Raises ValueError where something needed is missing.
    """

    regulation: Regulation
    teacher: tuple[Tensor, Tensor] | None = None
    least_kept: tuple[Tensor, Tensor] | None = None
    keys: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.regulation.teacher and self.teacher is None:
            raise ValueError(f"alpha={self.regulation.alpha} needs the teacher's features")
        if self.regulation.drop_below is not None and self.least_kept is None:
            raise ValueError(f"drop_below={self.regulation.drop_below} needs the loss's least_kept")

    def part(self, rows: slice) -> Weighting:
        """The weighting of a micro-batch: the bounds stay those of the global batch."""
        teacher, least_kept, keys = (
            None if pair is None else (pair[0][rows], pair[1][rows])
            for pair in (self.teacher, self.least_kept, self.keys)
        )
        return Weighting(self.regulation, teacher, least_kept, keys)

    def log_weights(self, cosine: Tensor, image: Tensor, text: Tensor, rows: slice, columns: slice) -> list[Tensor]:
        """(rows, columns) log w_ij up to a constant per anchor, -inf where removed: one for images as anchors and one
        for texts, or one for both.

        cosine: (rows, columns) float32, between image[rows] and text[columns].
        """
        regulation = self.regulation
        of_teacher = None
        if self.teacher is not None:
            of_teacher = _cosines(self.teacher[0][rows], self.teacher[1][columns])
        if regulation.drop_below is None or self.least_kept is None:
            return [-regulation.log_similarity(cosine, of_teacher)]
        of_images = of_texts = cosine
        if self.keys is not None:
            of_images, of_texts = (
                _cosines(image[rows], self.keys[1][columns]),
                _cosines(self.keys[0][rows], text[columns]),
            )
        bounds = self.least_kept[0][rows, None], self.least_kept[1][columns]
        found = []
        for similarity, bound in zip((of_images, of_texts), bounds, strict=True):
            r = -regulation.log_similarity(similarity, of_teacher)
            found.append(torch.zeros_like(r).masked_fill_(~(r >= bound.to(r.dtype)), -torch.inf))
        return found


@torch.no_grad()
def hard_negatives(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    pair_ids: Tensor | None = None,
    hardness: float = 1.0,
    weighting: Weighting | None = None,
    generator: torch.Generator | None = None,
    tile: int = 2048,
) -> HardNegatives:
    """Draw, for each pair of this rank, a text and an image that do not belong to it from this rank's other pairs.

    A negative is drawn with probability proportional to e^(hardness * z), or, with a weighting, to w e^(hardness * z),
    so that what resembles a false negative is not taken for a hard one. With drop_below, w is 1 for what the
    contrastive loss has kept and 0 for what it has removed; a pair whose negatives here are all removed has none.
    Gumbel-max: exact, vectorised, no host sync; `tile` x `tile` numbers at a time.

    image, text: (b, d) features, L2-normalised. hardness: 1 draws as ALBEF does, 0 evenly. pair_ids: (b,) or (b, k)
    int64; a pair's own partner is never drawn, nor one that shares an id. weighting: of these b pairs.
    generator: on the features' device.
    """
    if not math.isfinite(hardness):
        raise ValueError(f"hardness={hardness} must be finite")
    b = len(image)
    ids = None if pair_ids is None else ids_by_column(pair_ids)
    best = torch.full((2, b), -torch.inf, dtype=torch.float64, device=image.device)
    chosen = torch.zeros((2, b), dtype=torch.int64, device=image.device)
    parts = [slice(start, min(start + tile, b)) for start in range(0, b, tile)]
    indices = torch.arange(b, device=image.device)
    with torch.autocast(image.device.type, enabled=False):
        for rows, columns in itertools.product(parts, parts):
            cosine = _cosines(image[rows], text[columns])
            exponents = [hardness * logit_scale * cosine]  # for both directions, or one each
            if weighting is not None:
                log_weights = weighting.log_weights(cosine, image, text, rows, columns)
                exponents = [exponents[0] + log_weight for log_weight in log_weights]
            excluded = indices[rows, None] == indices[columns]
            if ids is not None:
                excluded |= (ids[rows, None] == ids[columns]).any(-1)
            exponents = [exponent.double().masked_fill_(excluded, -torch.inf) for exponent in exponents]
            for direction, (mine, theirs) in enumerate(((rows, columns), (columns, rows))):
                exponent = exponents[direction % len(exponents)]
                # minus the logarithm of an exponential variate has a Gumbel distribution
                noise = torch.empty_like(exponent).exponential_(generator=generator).log_()
                top, index = (exponent - noise).max(1 - direction)
                better = top > best[direction, mine]
                best[direction, mine] = torch.where(better, top, best[direction, mine])
                chosen[direction, mine] = torch.where(better, index + theirs.start, chosen[direction, mine])
    found = best > -torch.inf
    return HardNegatives(chosen[0], chosen[1], found[0], found[1])


def matching_loss(
    logits: Tensor, matched: Tensor, valid: Tensor, group: Group = None, total: Tensor | None = None
) -> Tensor:
    """Cross-entropy over pairs: mean over the valid pairs of all ranks, or over `total` of them (see `global_mean`).

    logits: (n, 2), index 1 means matched; matched: (n,) bool; valid: (n,) bool.
    """
    values = cross_entropy(logits.float(), matched.long(), reduction="none")
    return global_mean(values, valid.to(values.dtype), group, total)


def masked_language_loss(
    logits: Tensor,
    labels: Tensor,
    group: Group = None,
    soft: Tensor | None = None,
    soft_weight: float = 0.0,
    total: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over masked tokens: mean over those of all ranks, or over `total` of them (see `global_mean`); 0
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


def global_mean(values: Tensor, weights: Tensor, group: Group = None, total: Tensor | None = None) -> Tensor:
    """world * sum(values * weights on this rank) / sum(weights on all ranks), 0-dim; 0 where all weights are 0.

    values, weights: same shape, float; ranks may hold different numbers. The mean over ranks of this value, and of
    its gradients, is that of one process that holds everything. total: 0-dim, the sum of all weights, where the values
    of a step come in several calls: then these add up to the mean, and nothing is communicated.
    """
    if total is None:
        total = sum_over_ranks(weights.sum(), group)
    return world_size(group) * (values * weights).sum() / total.clamp(min=1e-12)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float().T
