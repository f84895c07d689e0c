"""Image-text matching: hard negatives drawn from the similarity, and the loss over matched and unmatched pairs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sacl_ds.distributed import Group
from sacl_ds.losses.reduction import global_mean
from sacl_ds.losses.regulation import Regulation


@dataclass(frozen=True)
class HardNegatives:
    """A text for each image and an image for each text: (b,) int64 places in the batch, and (b,) bool whether there was
    one to draw; the place means nothing otherwise."""

    text: Tensor
    image: Tensor
    text_found: Tensor
    image_found: Tensor

    @property
    def valid(self) -> Tensor:
        """(3b,) bool, of pairings: the b pairs themselves, images with their texts, texts with their images."""
        return torch.cat([torch.ones_like(self.text_found), self.text_found, self.image_found])


@torch.no_grad()
def hard_negatives(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    pair_ids: Tensor | None = None,
    hardness: float = 1.0,
    regulation: Regulation | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    tile: int = 2048,
) -> HardNegatives:
    """For each pair of this rank draw a text and an image that do not belong to it, from the other pairs of this rank.

    A negative is drawn with probability proportional to e^(hardness * z), or, with a regulation, to w e^(hardness * z),
    so that what resembles a false negative is not taken for a hard one. Gumbel-max: exact, vectorised, no host sync;
    `tile` x `tile` numbers at a time.

    image, text: (b, d) features, L2-normalised. hardness: 1 draws as ALBEF does, 0 evenly. pair_ids: (b,) or (b, k)
    int64; a pair's own partner is never drawn, nor one that shares an id. teacher: (b, d_t) features of both, where
    the regulation asks for them. generator: on the features' device.
    """
    b = len(image)
    ids = None if pair_ids is None else pair_ids.view(b, -1)
    best = torch.full((2, b), -torch.inf, dtype=torch.float64, device=image.device)
    chosen = torch.zeros((2, b), dtype=torch.int64, device=image.device)
    parts = [slice(start, min(start + tile, b)) for start in range(0, b, tile)]
    places = torch.arange(b, device=image.device)
    with torch.autocast(image.device.type, enabled=False):
        for rows, columns in itertools.product(parts, parts):
            cosine = image[rows].float() @ text[columns].float().T
            exponent = hardness * logit_scale * cosine
            if regulation is not None:
                of_teacher = None if teacher is None else teacher[0][rows].float() @ teacher[1][columns].float().T
                exponent = exponent - regulation.log_similarity(cosine, of_teacher)
            excluded = places[rows, None] == places[columns]
            if ids is not None:
                excluded |= (ids[rows, None] == ids[columns]).any(-1)
            exponent = exponent.double().masked_fill_(excluded, -torch.inf)
            for direction, (mine, theirs) in enumerate(((rows, columns), (columns, rows))):
                # minus the logarithm of an exponential variate has a Gumbel distribution
                noise = torch.empty_like(exponent).exponential_(generator=generator).log_()
                top, place = (exponent - noise).max(1 - direction)
                better = top > best[direction, mine]
                best[direction, mine] = torch.where(better, top, best[direction, mine])
                chosen[direction, mine] = torch.where(better, place + theirs.start, chosen[direction, mine])
    found = best > -torch.inf
    return HardNegatives(chosen[0], chosen[1], found[0], found[1])


def matching_loss(
    logits: Tensor, matched: Tensor, valid: Tensor, group: Group = None, total: Tensor | None = None
) -> Tensor:
    """Cross-entropy over pairs: mean over the valid pairs of all ranks, or over `total` of them (see `global_mean`).

    logits: (n, 2), index 1 means matched; matched: (n,) bool; valid: (n,) bool.
    """
    values = torch.nn.functional.cross_entropy(logits.float(), matched.long(), reduction="none")
    return global_mean(values, valid.to(values.dtype), group, total)
