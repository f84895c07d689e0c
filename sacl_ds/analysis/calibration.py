"""How sharp the regulation has to be: found from similarities alone, before anything is trained."""

from __future__ import annotations

import math

import numpy as np

_STEEPEST = 200.0


def share_under(cosines: np.ndarray, negatives: np.ndarray, sharpness: float, under: float) -> float:
    """Share of negatives whose weight at that sharpness is less than `under`, over both directions.

    cosines: (n, m) of one mini-batch, images in rows; negatives: (n, m) bool.
    """
    below = count = 0
    for c, allowed in ((cosines, negatives), (cosines.T, negatives.T)):
        exponents = np.where(allowed, -sharpness * c.astype(np.float64), -np.inf)
        best = exponents.max(1, keepdims=True)
        inverse = np.exp(exponents - np.where(np.isfinite(best), best, 0.0))
        total = inverse.sum(1, keepdims=True)
        weights = inverse * allowed.sum(1, keepdims=True) / np.where(total > 0, total, 1.0)
        below += int((weights[allowed] < under).sum())
        count += int(allowed.sum())
    return below / max(1, count)


def sharpness_for(cosines: np.ndarray, negatives: np.ndarray, share: float, under: float) -> float:
    """The smallest kappa at which `share` of the negatives weigh less than `under`; NaN where none up to 200 does.

    cosines: (n, m) of one mini-batch, images in rows; negatives: (n, m) bool. The share need not grow everywhere with
    kappa: a grid finds where it is first reached, bisection the place between two of its points.
    """
    low = 0.0
    for high in np.geomspace(0.05, _STEEPEST, 64):
        if share_under(cosines, negatives, float(high), under) >= share:
            break
        low = float(high)
    else:
        return math.nan
    for _ in range(30):
        middle = (low + high) / 2
        if share_under(cosines, negatives, middle, under) >= share:
            high = middle
        else:
            low = middle
    return float(high)


def fall(cosines: np.ndarray, share: float, teacher_sharpness: float) -> tuple[float, float]:
    """Similarity c0 that `share` of the cosines exceed, and the alpha that lets weights fall from there.

    With loss.sharpness = 0, s = alpha * e^(kappa_t * c) + (1 - alpha): flat below c0 and falling as e^(-kappa_t c) above
    it, where both terms are equal: alpha = 1 / (1 + e^(kappa_t * c0)).
    """
    start = float(np.quantile(cosines, 1 - share))
    exponent = teacher_sharpness * start
    # e^-x / (1 + e^-x) for x > 0: nothing overflows
    alpha = math.exp(-exponent) / (1 + math.exp(-exponent)) if exponent > 0 else 1 / (1 + math.exp(exponent))
    return start, alpha
