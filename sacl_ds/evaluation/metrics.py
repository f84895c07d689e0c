"""Retrieval metrics as pure functions of a score matrix and a relevance matrix, and their chance levels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEVER = np.iinfo(np.int64).max  # the place of a relevant candidate that there is none of


def _check(scores: np.ndarray, relevance: np.ndarray) -> None:
    if scores.ndim != 2 or scores.shape != relevance.shape or relevance.dtype != np.bool_:
        raise ValueError(f"need (n, m) scores and (n, m) bool relevance, got {scores.shape} and {relevance.shape}")


def best_relevant_places(scores: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Count the irrelevant candidates ahead of each query's best relevant one; NEVER where it has none.

    (n, m) scores, (n, m) bool -> (n,) int64. Ties never help: a relevant candidate stands behind every irrelevant one
    with the same score. NaN scores stand last.
    """
    _check(scores, relevance)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    best = np.where(relevance, scores, -np.inf).max(1, keepdims=True)
    ahead = ((scores >= best) & ~relevance).sum(1)
    return np.where(relevance.any(1), ahead, NEVER)


def recall_of_places(places: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    """Compute `recall_at_k` from the result of `best_relevant_places`."""
    return {k: float((places < k).mean()) for k in ks}


def recall_at_k(scores: np.ndarray, relevance: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    """Share of queries with a relevant candidate among the k best. (n, m) scores, (n, m) bool -> {k: fraction}.

    Ties never help, as in `best_relevant_places`. Queries without a relevant candidate count as missed.
    """
    return recall_of_places(best_relevant_places(scores, relevance), ks)


def average_precisions(scores: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Average precision over all relevant candidates of each query; NaN where it has none. Ties never help.

    (n, m) scores, (n, m) bool -> (n,) float64.
    """
    _check(scores, relevance)
    # stable sort with irrelevant candidates first among equals
    order = np.lexsort((relevance, -np.where(np.isnan(scores), -np.inf, scores)), axis=1)
    hits = np.take_along_axis(relevance, order, 1)
    precision = np.cumsum(hits, 1) / np.arange(1, hits.shape[1] + 1)
    relevant = hits.sum(1)
    return np.where(relevant > 0, (precision * hits).sum(1) / np.maximum(relevant, 1), np.nan)


def mean_average_precision(scores: np.ndarray, relevance: np.ndarray) -> float:
    """Mean over queries of average precision over all relevant candidates; ties never help.

    (n, m) scores, (n, m) bool. Queries without a relevant candidate are left out; NaN where none has one.
    """
    return mean_known(average_precisions(scores, relevance))


def mean_known(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


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


def chance_recall(counts: np.ndarray, candidates: int, ks: Sequence[int]) -> dict[int, float]:
    """Expected `recall_at_k` of a random ranking without ties; query i has counts[i] relevant candidates."""
    different, times = np.unique(counts, return_counts=True)
    result: dict[int, float] = {}
    for k in ks:
        drawn = np.arange(min(k, candidates))
        missed = np.clip((candidates - different[:, None] - drawn) / (candidates - drawn), 0, None).prod(1)
        result[k] = float(((1 - missed) * times).sum() / times.sum())
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
