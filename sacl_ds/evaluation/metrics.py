"""Retrieval metrics as pure functions of a score matrix and a relevance matrix, and what chance would give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _check(scores: np.ndarray, relevance: np.ndarray) -> None:
    if scores.ndim != 2 or scores.shape != relevance.shape or relevance.dtype != np.bool_:
        raise ValueError(f"need (n, m) scores and (n, m) bool relevance, got {scores.shape} and {relevance.shape}")


def recall_at_k(scores: np.ndarray, relevance: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    """Share of queries with a relevant candidate among the k best. (n, m) scores, (n, m) bool -> {k: fraction}.

    Ties never help: a relevant candidate stands behind every irrelevant one with the same score. Queries without a
    relevant candidate count as missed. NaN scores stand last.
    """
    _check(scores, relevance)
    scores = np.nan_to_num(scores, nan=-np.inf)
    best = np.where(relevance, scores, -np.inf).max(1, keepdims=True)
    ahead = ((scores >= best) & ~relevance).sum(1)
    found = relevance.any(1)
    return {k: float((found & (ahead < k)).mean()) for k in ks}


def mean_average_precision(scores: np.ndarray, relevance: np.ndarray) -> float:
    """Mean over queries of average precision over all relevant candidates; ties never help.

    (n, m) scores, (n, m) bool. Queries without a relevant candidate are left out; NaN where none has one.
    """
    _check(scores, relevance)
    # stable sort with irrelevant candidates first among equals
    order = np.lexsort((relevance, -np.nan_to_num(scores, nan=-np.inf)), axis=1)
    hits = np.take_along_axis(relevance, order, 1)
    precision = np.cumsum(hits, 1) / np.arange(1, hits.shape[1] + 1)
    relevant = hits.sum(1)
    average = (precision * hits).sum(1)[relevant > 0] / relevant[relevant > 0]
    return float(average.mean()) if len(average) else float("nan")


def ndcg(scores: np.ndarray, gains: np.ndarray, k: int) -> float:
    """Mean over queries of the discounted cumulative gain of the first k places, over that of the best ranking.

    (n, m) scores, (n, m) gains >= 0; the gain at place r (from 1) is divided by log2(1 + r). Ties never help. Queries
    without any gain are left out; NaN where none has one.
    """
    if scores.ndim != 2 or scores.shape != gains.shape or (gains < 0).any():
        raise ValueError(f"need (n, m) scores and (n, m) gains of at least 0, got {scores.shape} and {gains.shape}")
    order = np.lexsort((gains, -np.nan_to_num(scores, nan=-np.inf)), axis=1)
    discount = 1 / np.log2(np.arange(2, min(k, scores.shape[1]) + 2))
    reached, best = (
        (ranked[:, : len(discount)] * discount).sum(1, dtype=np.float64)
        for ranked in (np.take_along_axis(gains, order, 1), -np.sort(-gains, axis=1))
    )
    return float((reached[best > 0] / best[best > 0]).mean()) if (best > 0).any() else float("nan")


def chance_recall_at_k(relevance: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    """Expected `recall_at_k` of a random ranking without ties."""
    m = relevance.shape[1]
    counts = relevance.sum(1)
    result: dict[int, float] = {}
    for k in ks:
        drawn = min(k, m)
        missed = np.ones(len(counts))
        for i in range(drawn):
            missed *= np.clip((m - counts - i) / (m - i), 0, None)
        result[k] = float((1 - missed).mean())
    return result


def chance_mean_average_precision(relevance: np.ndarray) -> float:
    """Expected `mean_average_precision` of a random ranking without ties.

    For R relevant of m candidates: H_m / m + (1 - H_m / m) * (R - 1) / (m - 1), H_m the harmonic number.
    """
    m = relevance.shape[1]
    counts = relevance.sum(1)
    counts = counts[counts > 0]
    harmonic = (1 / np.arange(1, m + 1)).sum() / m
    if not len(counts):
        return float("nan")
    return float((harmonic + (1 - harmonic) * (counts - 1) / max(1, m - 1)).mean())
