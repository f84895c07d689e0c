"""Retrieval metrics of both directions, each with its chance level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sacl_ds.evaluation.metrics import (
    chance_mean_average_precision,
    chance_recall,
    mean_known,
    recall_of_places,
)
from sacl_ds.evaluation.retrieval.first_stage import Ranked, Relevance, mean_precisions

KS = (1, 5, 10)
OWN, ANY = "own", "any"

Figures = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Truth:
    """Relevance of candidates. owner: (m,) each caption's image of n; satisfying: (m, n) bool, None if unknown."""

    owner: np.ndarray
    images: int
    satisfying: np.ndarray | None

    @property
    def right(self) -> str:
        """Name of the relevance that a person would count as right."""
        return OWN if self.satisfying is None else ANY

    def of_texts(self) -> dict[str, Relevance]:
        named: dict[str, Relevance] = {OWN: lambda rows: self.owner[rows, None] == np.arange(self.images)}
        if (known := self.satisfying) is not None:
            named[ANY] = lambda rows: known[rows]
        return named

    def of_images(self) -> dict[str, Relevance]:
        named: dict[str, Relevance] = {OWN: lambda rows: np.arange(self.images)[rows, None] == self.owner}
        if (known := self.satisfying) is not None:
            named[ANY] = lambda rows: known.T[rows]
        return named


def figures_of(
    truth: Truth,
    text_to_image: Ranked,
    image_to_text: Ranked,
    features: tuple[np.ndarray, np.ndarray],
    reranked: tuple[np.ndarray, np.ndarray] | None = None,
    prefix: str = "",
) -> Figures:
    """Compute the metrics of both directions, {name: (value, chance)}, fractions.

    features: text (m, d) and image (n, d). reranked: for each text the first k images of the first stage, and their
    scores (`mean_precisions`).
    """
    known, m, n = truth.satisfying, len(truth.owner), truth.images
    own = np.bincount(truth.owner, minlength=n)
    table: Figures = {}
    if known is not None:
        table["text_to_image_any_R@1"] = _recalls(text_to_image, ANY, known.sum(1), n, (1,))[1]
        average = mean_known(mean_precisions(*features, truth.of_texts()[ANY], reranked))
        table["text_to_image_mAP"] = average, chance_mean_average_precision(known)
        table["image_to_text_any_R@1"] = _recalls(image_to_text, ANY, known.sum(0), m, (1,))[1]
    recalls = {
        f"{direction}_R@{k}": pair
        for direction, ranked, counts, candidates in (
            ("text_to_image", text_to_image, np.ones(m, np.int64), n),
            ("image_to_text", image_to_text, own, m),
        )
        for k, pair in _recalls(ranked, OWN, counts, candidates, KS).items()
    }
    value, chance = (float(np.mean([pair[part] for pair in recalls.values()])) for part in (0, 1))
    return {prefix + name: pair for name, pair in (table | recalls | {"mean_recall": (value, chance)}).items()}


def _recalls(
    ranked: Ranked, relevance: str, counts: np.ndarray, candidates: int, ks: tuple[int, ...]
) -> dict[int, tuple[float, float]]:
    values, chances = recall_of_places(ranked.places[relevance], ks), chance_recall(counts, candidates, ks)
    return {k: (values[k], chances[k]) for k in ks}
