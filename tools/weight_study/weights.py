"""Weights of the negatives for every arm, and their loss: dense, for batches of some hundred pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sacl_ds.losses import Regulation
from sacl_ds.losses.weights import AnchorSums
from sacl_ds.losses.weights import log_weights as regulated_weights
from weight_study.plan import Arm


@dataclass(frozen=True)
class DirectionSimilarities:
    """Similarities of one direction, anchors in rows. All (n, n); constants for the gradient.

    cosine: of the model; teacher: of its teacher, or None; negatives: bool; relevance: in [0, 1], how true the caption
    is of the picture.
    """

    cosine: Tensor
    teacher: Tensor | None
    negatives: Tensor
    relevance: Tensor

    def turned(self) -> DirectionSimilarities:
        """Transpose to the other direction."""
        teacher = None if self.teacher is None else self.teacher.T
        return DirectionSimilarities(self.cosine.T, teacher, self.negatives.T, self.relevance.T)


def log_weights(
    arm: Arm, regulation: Regulation, seen: DirectionSimilarities, scale: float, generator: torch.Generator
) -> Tensor:
    """Compute (n, n) log w_ij, -inf where j is no negative of i or is removed.

    regulation: the arm's at this step; generator: deals out shuffled weights.
    """
    nothing = ~seen.negatives
    even = torch.zeros_like(seen.cosine).masked_fill(nothing, -torch.inf)
    if arm.weights in ("even", "hard"):
        return even + math.log(arm.mass)
    if arm.weights == "matches":
        return even.masked_fill(seen.relevance >= 1, -torch.inf)
    if arm.weights in ("relevance", "relevance_shape"):
        full = (1 - seen.relevance).log().masked_fill(nothing, -torch.inf)
        return full if arm.weights == "relevance" else full - _mass(full, seen, scale)
    mass = arm.mass if arm.weights == "sacl" else 1.0
    drop_below = None if arm.weights == "removed_share" else arm.drop_below
    regulation = replace(regulation, negative_mass=mass, drop_below=drop_below)
    teacher = None if seen.teacher is None else seen.teacher.double()
    regulated = regulated_weights(seen.cosine.double(), seen.negatives, regulation, teacher).to(even.dtype)
    if arm.weights == "sacl" or drop_below is not None:
        return regulated
    if arm.weights == "removed_share":
        kept = regulated.masked_fill(nothing, torch.nan).nanquantile(arm.share, 1, keepdim=True)
        return even.masked_fill(regulated < kept, -torch.inf)
    if arm.weights == "shuffled":
        return _shuffled(regulated, seen.negatives, generator)
    push = _mass(regulated, seen, scale)
    return even + push if arm.weights == "mass_only" else regulated - push


def contrastive(arm: Arm, cosine: Tensor, scale: Tensor, weights: Tensor, negatives: Tensor) -> Tensor:
    """Compute the losses (n,) of the anchors in rows.

    cosine (n, n) and scale carry gradient; weights: (n, n) log w_ij.
    """
    z = scale * cosine
    own = z.diagonal()
    pushed = (z + weights).logsumexp(1)
    if arm.weights == "hard":
        pushed = _hard(arm, z, scale.detach(), negatives)
    margin = pushed - own
    return torch.where(negatives.any(1), torch.nn.functional.softplus(margin), torch.zeros_like(margin))


def _hard(arm: Arm, z: Tensor, scale: Tensor, negatives: Tensor) -> Tensor:
    """Compute the log of the negatives' sum of Robinson et al. (2021, Eq. 4); with beta 0 of Chuang et al. (2020, Eq.
    8).

    As in their definition the importance weights carry gradient, and the sum is at least n e^(-scale).
    """
    count = negatives.sum(1).to(z.dtype)
    own = z.diagonal()
    log_mean, log_importance = (
        (power * z).masked_fill(~negatives, -torch.inf).logsumexp(1) for power in (1 + arm.beta, arm.beta)
    )
    log_mean = log_mean - log_importance
    # in units of the largest term, so that neither exponential leaves its range
    shift = torch.maximum(log_mean, own).detach()
    rest = ((log_mean - shift).exp() - arm.positives * (own - shift).exp()) / (1 - arm.positives)
    floor = (-scale - shift).exp()
    return torch.maximum(rest, floor).log() + shift + count.log()


def _mass(weights: Tensor, seen: DirectionSimilarities, scale: float) -> Tensor:
    """Return (n, 1): how much the weights add to the log-sum of the negatives."""
    return AnchorSums.of(scale * seen.cosine, weights, seen.negatives).mass[:, None].to(weights.dtype)


def _shuffled(weights: Tensor, negatives: Tensor, generator: torch.Generator) -> Tensor:
    """Permute each row's weights among its negatives."""
    noise = torch.rand(weights.shape, generator=generator, device="cpu").to(weights.device)
    places = noise.masked_fill(~negatives, 2.0).argsort(1)  # negatives first, in random order
    source = (~negatives).to(torch.int8).argsort(dim=1, stable=True)  # negatives first, as they stand
    return torch.full_like(weights, -torch.inf).scatter(1, places, weights.gather(1, source))
