"""Metrics against brute force and against hand-made matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sacl_ds.evaluation.metrics import (
    chance_mean_average_precision,
    chance_recall,
    mean_average_precision,
    recall_at_k,
)


def worst_order(scores: np.ndarray, relevant: np.ndarray) -> list[int]:
    """Best score first; among equals the irrelevant first."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], relevant[j]))


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31), st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_equal_brute_force_also_with_ties(n: int, m: int, seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (n, m)).astype(np.float32)
    relevance = rng.random((n, m)) < 0.4
    orders = [worst_order(s, r) for s, r in zip(scores, relevance, strict=True)]
    for k in (1, 3, 5):
        expected = np.mean([any(r[j] for j in order[:k]) for r, order in zip(relevance, orders, strict=True)])
        assert recall_at_k(scores, relevance, [k])[k] == pytest.approx(expected)
    precisions = []
    for r, order in zip(relevance, orders, strict=True):
        hits = [position for position, j in enumerate(order) if r[j]]
        if hits:
            precisions.append(np.mean([(i + 1) / (position + 1) for i, position in enumerate(hits)]))
    if precisions:
        assert mean_average_precision(scores, relevance) == pytest.approx(np.mean(precisions))


def test_by_hand() -> None:
    scores = np.array([[0.9, 0.8, 0.1], [0.2, 0.3, 0.3]])
    relevance = np.array([[False, True, True], [False, True, False]])
    assert recall_at_k(scores, relevance, [1, 2]) == {1: 0.0, 2: 1.0}
    assert mean_average_precision(scores, relevance) == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1 / 2) / 2)
    constant = np.zeros((2, 3))
    assert recall_at_k(constant, relevance, [1])[1] == 0.0  # equal scores earn nothing
    assert recall_at_k(np.full((2, 3), np.nan), relevance, [1])[1] == 0.0


def test_chance_is_what_random_rankings_give() -> None:
    rng = np.random.default_rng(0)
    relevance = rng.random((40, 30)) < 0.15
    relevance[:, 0] = True
    draws = [rng.random(relevance.shape) for _ in range(400)]
    recall = np.mean([list(recall_at_k(s, relevance, [1, 5]).values()) for s in draws], 0)
    np.testing.assert_allclose(
        list(chance_recall(relevance.sum(1), relevance.shape[1], [1, 5]).values()), recall, atol=0.01
    )
    average = np.mean([mean_average_precision(s, relevance) for s in draws])
    assert chance_mean_average_precision(relevance) == pytest.approx(average, abs=0.005)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="need"):
        recall_at_k(np.zeros((2, 3)), np.zeros((3, 2), bool), [1])
    with pytest.raises(ValueError, match="bool"):
        recall_at_k(np.zeros((2, 3)), np.zeros((2, 3)), [1])
