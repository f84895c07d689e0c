"""The sharpness at which a chosen share of the negatives falls under a chosen weight, on cosines of mini-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sacl_ds.losses import Regulation
from sacl_ds.losses.weights import log_weights

LEAST, LARGEST = 0.05, 200.0  # sharpnesses that are tried
_GRID = 64
_TOLERANCE = 1e-6  # of the sharpness, relative


@dataclass(frozen=True)
class Calibrated:
    """The smallest sharpness that reaches the share, None where none does; and the curve that was searched.

    share: under the weight at `sharpness`, else at the largest one tried.
    """

    sharpness: float | None
    share: float
    grid: np.ndarray  # (g,) sharpnesses
    shares: np.ndarray  # (g,) the share under the weight at each of them


def share_under(
    cosines: Sequence[np.ndarray], negatives: Sequence[np.ndarray], sharpness: float, under: float
) -> float:
    """Share of the negatives of all anchors in both directions whose weight is under `under`.

    cosines: for each mini-batch (n, m), image i with text j; negatives: (n, m) bool alike. The weights are those of the
    loss with this one similarity.
    """
    count = total = 0
    for cosine, mask in zip(cosines, negatives, strict=True):
        c, stays = torch.from_numpy(np.asarray(cosine, np.float64)), torch.from_numpy(mask)
        for side, is_negative in ((c, stays), (c.T, stays.T)):
            low = log_weights(side, is_negative, Regulation(0.0, sharpness)) < math.log(under)
            count += int((low & is_negative).sum())
            total += int(is_negative.sum())
    if total == 0:
        raise ValueError("no pair is a negative of another")
    return count / total


def calibrated(
    cosines: Sequence[np.ndarray], negatives: Sequence[np.ndarray], share: float, under: float
) -> Calibrated:
    """The smallest sharpness at which `share` of the negatives weighs less than `under`; arguments as in `share_under`.

    log w is concave in the sharpness and 0 where that is 0, so a weight that has fallen under a bound of at most 1
    stays there: the share never falls as the sharpness grows. Raises ValueError for a share outside (0, 1) or a weight
    outside (0, 1].
    """
    if not 0 < share < 1 or not 0 < under <= 1:
        raise ValueError(f"share={share} must lie in (0, 1) and under={under} in (0, 1]")
    cosines = [np.asarray(cosine, np.float64) for cosine in cosines]
    grid = np.geomspace(LEAST, LARGEST, _GRID)
    shares = np.array([share_under(cosines, negatives, float(kappa), under) for kappa in grid])
    reached = np.flatnonzero(shares >= share)
    if not len(reached):
        return Calibrated(None, float(shares[-1]), grid, shares)
    high = float(grid[reached[0]])
    low = float(grid[reached[0] - 1]) if reached[0] else 0.0
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        if share_under(cosines, negatives, middle, under) >= share:
            high = middle
        else:
            low = middle
    return Calibrated(high, share_under(cosines, negatives, high, under), grid, shares)


def sharpness_for(cosines: np.ndarray, negatives: np.ndarray, share: float, under: float) -> float:
    """`calibrated` for one mini-batch, (n, m) both: the sharpness, NaN where none reaches the share."""
    found = calibrated([cosines], [negatives], share, under).sharpness
    return math.nan if found is None else found
