"""Metrics of a ranking, and the first candidates of every query before and after re-ranking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sacl_ds.evaluation.encoding import Encoded
from sacl_ds.evaluation.first_stage import Ranked, Relevance, mean_precisions
from sacl_ds.evaluation.metrics import (
    chance_mean_average_precision,
    chance_recall,
    mean_known,
    recall_of_places,
)

LISTED = 10


@dataclass(frozen=True)
class Listed:
    """First candidates of q queries. order: (q, 10 at most) int64, indices; right: the same shape, bool."""

    order: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, ranked: Ranked, relevance: str) -> Listed:
        return cls(ranked.top[:, :LISTED], ranked.hits[relevance][:, :LISTED])

    def place(self, query: int) -> int:
        """Rank of the first right candidate, from 0; the length of the list where none of them is right."""
        right = np.flatnonzero(self.right[query])
        return int(right[0]) if len(right) else self.order.shape[1]


@dataclass(frozen=True)
class Ranking:
    """Ranking of n images and m captions; an image's index, 0 to n - 1, is not its number where some could not be read.

    numbers: (n,) where each image stands in the source. owner: (m,) the place of a caption's own image. Right is a
    candidate that is known to satisfy, or where that is not known, the own one. reranked_*: None without re-ranking.
    """

    numbers: np.ndarray
    keys: list[str]
    captions: list[str]
    owner: np.ndarray
    text_to_image: Listed
    image_to_text: Listed
    reranked_text_to_image: Listed | None = None
    reranked_image_to_text: Listed | None = None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield an object for JSON a query, first of all captions, then of all images."""
        for text, caption in enumerate(self.captions):
            said: dict[str, Any] = {"query": caption, "own": self.keys[self.owner[text]]}
            yield said | self._orders(text, self.keys, self.text_to_image, self.reranked_text_to_image)
        for image, key in enumerate(self.keys):
            said = {"query": key, "own": [self.captions[i] for i in np.flatnonzero(self.owner == image)]}
            yield said | self._orders(image, self.captions, self.image_to_text, self.reranked_image_to_text)

    @staticmethod
    def _orders(query: int, names: list[str], first: Listed, second: Listed | None) -> dict[str, Any]:
        stages = {"first_stage": first} | ({} if second is None else {"reranked": second})
        return {
            stage: [
                {"candidate": names[place], "right": bool(right)}
                for place, right in zip(listed.order[query], listed.right[query], strict=True)
            ]
            for stage, listed in stages.items()
        }


def ranking_of(
    encoded: Encoded, first: tuple[Ranked, Ranked], second: tuple[Ranked, Ranked] | None, relevance: str
) -> Ranking:
    """first, second: text to image, image to text. relevance: the name of what counts as right."""
    return Ranking(
        encoded.numbers,
        encoded.keys,
        encoded.captions,
        encoded.owner,
        *(Listed.of(each, relevance) for each in (*first, *(second or ()))),
    )


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
