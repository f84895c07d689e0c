"""Pictures of scenes and the truth of captions about them, derived from their keys alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from sacl_ds.config import RunConfig
from sacl_ds.data.scene_language import Caption, relevance
from sacl_ds.data.scenes import DETAILS, Scenes, place_of
from sacl_ds.data.sources import scene_size


class SceneTruth:
    """Pictures and relevance of the scenes that a run is trained or evaluated on."""

    def __init__(self, run: RunConfig) -> None:
        self._size, self._first = scene_size(run.model.image_size), run.data.scenes.detail
        self._captions = lru_cache(4096)(self._find_caption)

    def picture(self, key: str) -> Image.Image | None:
        """Draw the scene with that key; None for a key that is no scene's."""
        place = place_of(key)
        return None if place is None else Image.fromarray(self._scenes(*place).image(place[1]))

    def relevance(self, caption_key: str, caption: str, picture_key: str) -> float | None:
        """Share of the caption's statements that hold in the picture, 1.0 where it is true of it; None where it cannot
        be known: keys of no scene, a caption that was not written for the scene of caption_key."""
        written, place = self._captions(caption_key, caption), place_of(picture_key)
        if written is None or place is None:
            return None
        return float(relevance([written], [self._scenes(*place).scene(place[1])])[0, 0])

    def table(self, keys: Sequence[str], captions: Sequence[str]) -> np.ndarray:
        """(n, n) float32: `relevance` of caption i to the picture of key j, NaN where it cannot be known."""
        written = [self._captions(key, caption) for key, caption in zip(keys, captions, strict=True)]
        places = [place_of(key) for key in keys]
        found = np.full((len(keys), len(keys)), np.nan, np.float32)
        rows = [row for row, caption in enumerate(written) if caption is not None]
        columns = [column for column, place in enumerate(places) if place is not None]
        said = [caption for caption in written if caption is not None]
        scenes = [self._scenes(*place).scene(place[1]) for place in places if place is not None]
        if said and scenes:
            found[np.ix_(rows, columns)] = relevance(said, scenes)
        return found

    def _find_caption(self, key: str, text: str) -> Caption | None:
        place = place_of(key)
        if place is None:
            return None
        for detail in sorted(DETAILS, key=lambda each: each != self._first):
            for caption in self._scenes(*place, detail).captions(place[1]):
                if caption.text == text:
                    return caption
        return None

    def _scenes(self, seed: int, index: int, detail: str = "partial") -> Scenes:
        return Scenes(index + 1, seed, self._size, detail)


def truth_of(run: RunConfig) -> SceneTruth | None:
    """Return the truth about a run's pairs, or None for data of which nothing is known."""
    return SceneTruth(run) if run.data.source == "scenes" else None


def verdict(relevance: float | None, what: str) -> tuple[str, bool | None]:
    """(badge, good) for a false negative: 'true of the picture' or how much of the caption holds."""
    if relevance is None:
        return "", None
    if relevance == 1.0:
        return f"true {what}", True
    return f"{relevance:.0%} of it holds", False
