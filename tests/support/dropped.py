"""Which negatives `drop_below` removes, in numpy over a whole global batch, for what draws or sums over the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sacl_ds.losses import Regulation


@dataclass(frozen=True)
class Kept:
    """Of N anchors, float64. kept: (N, N) bool, negatives in the batch that stay; least: (N,) the least -log s of one
    that would stay; margin: how near a weight comes to drop_below, as a ratio less 1."""

    kept: np.ndarray
    least: np.ndarray
    margin: float


def kept_negatives(
    anchors: Tensor, keys: Tensor, teacher: tuple[Tensor, Tensor] | None, same: np.ndarray, regulation: Regulation
) -> Kept:
    """anchors: (N, d); keys: (N + m, d), the batch's and a queue's, whose weights have their mean together; teacher:
    features of anchors and keys; same: (N, N + m) bool, what is no negative."""
    cosine = anchors.double().numpy() @ keys.double().numpy().T
    s = (1 - regulation.alpha) * np.exp(regulation.sharpness * cosine)
    if regulation.alpha:
        of_teacher = teacher[0].double().numpy() @ teacher[1].double().numpy().T
        s = s + regulation.alpha * np.exp(regulation.teacher_sharpness * of_teacher)
    inverse = np.where(same, 0.0, 1 / s)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = inverse.sum(1) / (~same).sum(1)
        weights = inverse / mean[:, None]
        least = np.log(regulation.drop_below) + np.log(mean)
    kept = ~same & (weights >= regulation.drop_below)
    margin = float(np.abs(weights[~same] / regulation.drop_below - 1).min()) if (~same).any() else np.inf
    return Kept(kept[:, : len(anchors)], least, margin)


def same_pairs(ids: Tensor | None, n: int, queue: int = 0) -> np.ndarray:
    """(n, n + queue) bool: a pair itself, and those that share an id; ids: (n + queue, k)."""
    same = np.eye(n, n + queue, dtype=bool)
    if ids is None:
        return same
    values = ids.numpy()
    return same | (values[:n, None] == values[None]).any(-1)
