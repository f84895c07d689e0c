"""First candidates of every query, before and after re-ranking: for pictures and for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sacl_ds.evaluation.retrieval.encoding import Encoded
from sacl_ds.evaluation.retrieval.first_stage import Ranked

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
