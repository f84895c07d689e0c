"""First stage of retrieval: ranking by features. Queries go over the ranks, in chunks; no (n, m) matrix is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from sacl_ds.distributed import gather_objects, rank, world_size
from sacl_ds.evaluation.metrics import average_precisions, best_relevant_places
from sacl_ds.evaluation.rounds import Done, unseen

_SCORES_AT_ONCE = 2**19

Relevance = Callable[[slice], np.ndarray]  # of these queries: (rows, m) bool


@dataclass(frozen=True)
class Ranked:
    """q queries ranked. By the name of each relevance: places, (q,) int64, of the best relevant candidate as
    `best_relevant_places` has it, and hits, (q, k) bool, whether the candidates of `top` are relevant. top: (q, k)
    int64, the best candidates in order, the one that stands first in the set first among equals."""

    top: np.ndarray
    places: dict[str, np.ndarray]
    hits: dict[str, np.ndarray]


def rank_candidates(
    queries: np.ndarray,
    candidates: np.ndarray,
    relevance: Mapping[str, Relevance],
    k: int,
    done: Done = unseen,
    stage: str = "ranking",
) -> Ranked:
    """Rank m candidates for each query by features; every rank calls it and gets the same.

    queries, candidates: (q, d) and (m, d) unit features, float32. k: best candidates to return, at most m.
    """
    mine = _share(len(queries))
    tops: list[np.ndarray] = []
    places: dict[str, list[np.ndarray]] = {name: [] for name in relevance}
    hits: dict[str, list[np.ndarray]] = {name: [] for name in relevance}
    for rows, scores in _chunks(queries, candidates, mine):
        tops.append(best(scores, k))
        for name, of in relevance.items():
            relevant = of(rows)
            places[name].append(best_relevant_places(scores, relevant))
            hits[name].append(np.take_along_axis(relevant, tops[-1], 1))
        done(stage, rows.stop - mine.start, len(mine))
    return Ranked(
        _gathered(tops, k, np.int64),
        {name: _gathered(parts, None, np.int64) for name, parts in places.items()},
        {name: _gathered(parts, k, np.bool_) for name, parts in hits.items()},
    )


def mean_precisions(
    queries: np.ndarray,
    candidates: np.ndarray,
    relevance: Relevance,
    reranked: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """(q,) average precision of each query over all candidates, NaN where none is relevant.

    reranked: (q, k) candidates that stand before all others, and (q, k) scores that order them among themselves.
    """
    values = []
    for rows, scores in _chunks(queries, candidates, _share(len(queries))):
        if reranked is not None:
            scores = scores.astype(np.float64)
            top, second = reranked[0][rows], reranked[1][rows].astype(np.float64)
            # cosines end at 1: first come those of the list, from 9 to 11, then those of it whose score is NaN
            lifted = np.where(np.isnan(second), 8.0, 10 + second / (1 + np.abs(second)))
            np.put_along_axis(scores, top, lifted, 1)
        values.append(average_precisions(scores, relevance(rows)))
    return _gathered(values, None, np.float64)


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the k best of (q, m) float32 in order, (q, k) int64; among equals the first comes first, NaN last.

    Score and place go into one integer each, so that no two are equal and a partition, far cheaper than a stable sort,
    finds just the ones that a stable sort would.
    """
    scores = np.where(np.isnan(scores), np.float32(-np.inf), scores) + np.float32(0)  # -0 becomes 0
    bits = scores.astype(np.float32, copy=False).view(np.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)  # in the order of the floats
    m = scores.shape[1]
    keys = (rising << 32) + (m - 1 - np.arange(m, dtype=np.int64))
    if k < m:
        keys.partition(m - k, axis=1)
    found = np.sort(keys[:, m - k :], axis=1)[:, ::-1]
    return m - 1 - (found & 0xFFFFFFFF)


def _share(queries: int) -> range:
    return range(queries * rank() // world_size(), queries * (rank() + 1) // world_size())


def _chunks(queries: np.ndarray, candidates: np.ndarray, mine: range) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield chunks of queries: (rows, their (rows, m) scores)."""
    together = max(1, _SCORES_AT_ONCE // len(candidates))
    for start in range(mine.start, mine.stop, together):
        rows = slice(start, min(start + together, mine.stop))
        yield rows, queries[rows] @ candidates.T


def _gathered(parts: list[np.ndarray], width: int | None, kind: type) -> np.ndarray:
    empty: np.ndarray = np.empty((0,) if width is None else (0, width), kind)
    return np.concatenate(gather_objects(np.concatenate([empty, *parts])))
