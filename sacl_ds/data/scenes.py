"""Scenes: the built-in data set. Small pictures with captions whose false negatives are known exactly.

No files, no network: item i of `Scenes(count, seed)` is computed from (VERSION, seed, i), so any process can make
any item, and any number of fresh ones. `relevance` says which captions are true of which pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from sacl_ds.data.scene_language import (
    Caption,
    Draws,
    Scene,
    draw_captions,
    draw_pair_statement,
    draw_questions,
    draw_scene,
    relevance,
)
from sacl_ds.data.scene_rendering import render

VERSION = 1  # raise it when any picture or sentence changes: studies compare like with like
CAPTIONS_PER_SCENE = 4
DETAILS = ("partial", "simple", "detailed")
_INDEX_DIGITS = 9  # of a key, behind the seed
_CAPTIONS, _PICTURE, _QUESTIONS, _PAIRS = range(1, 5)


@dataclass(frozen=True, slots=True)
class SceneItem:
    key: str
    image: np.ndarray  # (image_size, image_size, 3) uint8
    captions: list[str]


class Scenes:
    """A data set of `count` scenes; item i is the same for every process, image size and count.

    detail: "partial" captions say something of one or two objects (the training set); "simple" ones name one object
    by its colour and shape, "detailed" ones say so much that they are true of few other pictures (clean
    captioned sets for a teacher).
    """

    def __init__(
        self, count: int, seed: int, image_size: int = 48, detail: str = "partial", captions: int = CAPTIONS_PER_SCENE
    ) -> None:
        if count < 1:
            raise ValueError(f"count={count}: a set of scenes needs at least one")
        if detail not in DETAILS:
            raise ValueError(f"detail={detail!r}: choose one of {', '.join(DETAILS)}")
        self.count, self.seed, self.image_size, self.detail = count, seed, image_size, detail
        self.captions_per_scene = captions

    def __len__(self) -> int:
        return self.count

    def _index(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        return index

    def scene(self, index: int) -> Scene:
        return draw_scene(Draws(VERSION, self.seed, self._index(index), count=32))

    def captions(self, index: int) -> list[Caption]:
        draws = Draws(VERSION, self.seed, self._index(index), _CAPTIONS, count=32 * self.captions_per_scene)
        return draw_captions(draws, self.scene(index), self.captions_per_scene, self.detail)

    def image(self, index: int) -> np.ndarray:
        return render(self.scene(index), self.image_size, (VERSION, self.seed, self._index(index), _PICTURE))

    def questions(self, index: int) -> list[tuple[str, str, str]]:
        """(type, question, answer) triples about scene `index`, for VQA."""
        return draw_questions(Draws(VERSION, self.seed, self._index(index), _QUESTIONS, count=16), self.scene(index))

    def pair_statement(self, left: int, right: int) -> tuple[str, bool]:
        """Draw a statement about two scenes and its truth, for NLVR2."""
        draws = Draws(VERSION, self.seed, self._index(left), self._index(right), _PAIRS, count=64)
        return draw_pair_statement(draws, self.scene(left), self.scene(right))

    def key(self, index: int) -> str:
        return f"{self.seed:04d}{self._index(index):0{_INDEX_DIGITS}d}"

    def __getitem__(self, index: int) -> SceneItem:
        return SceneItem(self.key(index), self.image(index), [caption.text for caption in self.captions(index)])

    def relevance(self) -> np.ndarray:
        """(count * captions_per_scene, count) float32; rows in the order of the items and their captions.

        1.0 where the caption is true of the picture: on the caption's own picture and on its false negatives.
        """
        captions = [caption for index in range(self.count) for caption in self.captions(index)]
        return relevance(captions, [self.scene(index) for index in range(self.count)])

    def fingerprint(self) -> str:
        """SHA-256 over all pictures, captions, questions and one statement each."""
        digest = hashlib.sha256()
        for index in range(self.count):
            item = self[index]
            digest.update(item.image.tobytes())
            said = (item.captions, self.questions(index), self.pair_statement(index, (index + 1) % self.count))
            digest.update(repr(said).encode())
        return digest.hexdigest()


def place_of(key: str) -> tuple[int, int] | None:
    """Parse (seed, index) from a scene's key (`Scenes.key`); None for a key that is no scene's."""
    if not (key.isascii() and key.isdigit() and len(key) > _INDEX_DIGITS):
        return None
    return int(key[:-_INDEX_DIGITS]), int(key[-_INDEX_DIGITS:])
