"""Quality of scores as detectors: ROC, precision and recall, rank correlation. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_POINTS = 2000  # of a curve that is kept


@dataclass(frozen=True)
class Curve:
    """Exact figures over all scores, and the curves at some of the thresholds, the highest first.

    auc: the share of (positive, negative) pairs in which the positive scores higher, ties half. average_precision: the
    sum over thresholds of the gain in recall times the precision. chance: the share of positives, the average precision
    of random scores. recall, precision, false_positive: (points,).
    """

    positives: int
    negatives: int
    auc: float
    average_precision: float
    recall: np.ndarray
    precision: np.ndarray
    false_positive: np.ndarray

    @property
    def chance(self) -> float:
        return self.positives / (self.positives + self.negatives)


class Detector:
    """Scores against a binary truth. The positives are known at once, the many negatives come piece by piece.

    Only the number of negatives between any two positives is kept, from which everything follows exactly.
    """

    def __init__(self, positives: np.ndarray) -> None:
        """Sort the scores of the samples to be found. positives: (p,). Raises ValueError where there is none."""
        if not len(positives):
            raise ValueError("there is nothing to be found")
        self._thresholds, self._positives = np.unique(positives, return_counts=True)
        # slots: under the first threshold, at it, between it and the second, at the second, and so on
        self._negatives = np.zeros(2 * len(self._thresholds) + 1, np.int64)

    def add(self, negatives: np.ndarray) -> None:
        """Scores of what is not to be found, any shape."""
        scores = np.sort(negatives, axis=None)
        left = np.searchsorted(scores, self._thresholds, "left")
        right = np.searchsorted(scores, self._thresholds, "right")
        bounds = np.empty(len(self._negatives) + 1, np.int64)
        bounds[0], bounds[-1] = 0, len(scores)
        bounds[1:-1:2], bounds[2:-1:2] = left, right
        self._negatives += np.diff(bounds)

    def curve(self) -> Curve:
        """Raises ValueError where no negative came."""
        p, n = int(self._positives.sum()), int(self._negatives.sum())
        if not n:
            raise ValueError("there is nothing that is not to be found")
        at, under = self._negatives[1::2], np.cumsum(self._negatives)[:-1:2]  # with, and below, each threshold
        auc = float((self._positives * (under + at / 2)).sum() / (p * n))
        found = np.cumsum(self._positives[::-1])  # from the highest threshold down
        wrong = n - under[::-1]
        precision, recall = found / (found + wrong), found / p
        average = float((precision * np.diff(recall, prepend=0.0)).sum())
        points = np.unique(np.linspace(0, len(found) - 1, _POINTS).astype(int))
        return Curve(p, n, auc, average, recall[points], precision[points], wrong[points] / n)


def ranks(values: np.ndarray) -> np.ndarray:
    """(n,) float64: 1 for the smallest; equal values share the mean of their ranks."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.append(first, len(values)))
    found = np.empty(len(values))
    found[order] = np.repeat(first + (sizes + 1) / 2, sizes)
    return found


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of (n,) and (n,), ties by mean ranks; NaN where either is constant."""
    if len(a) != len(b):
        raise ValueError(f"need as many values of both, got {len(a)} and {len(b)}")
    x, y = (each - each.mean() for each in (ranks(a), ranks(b)))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else float("nan")
