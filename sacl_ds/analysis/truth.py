"""Anchors, candidates and their graded relevance, for sets whose false negatives are known."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sacl_ds.analysis.pairs import Pairs
from sacl_ds.data.scene_language import Caption, Scene, relevance
from sacl_ds.data.scenes import Scenes, place_of
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.losses.weights import log_weights

COCO = "coco:test"  # the shard of pairs from `sacl_ds.analysis.detect`
_ROWS = 256  # anchors at a time


@dataclass(frozen=True)
class GradedNegatives:
    """Query of one direction under one truth: anchors, candidates and their relevance.

    anchors (a, d), candidates (m, d): unit features, as are the teacher's. anchor_ids (a, k), candidate_ids (m, k): a
    match in any column is no negative. relevance: (a, m) in [0, 1], 1 for a false negative, or for each anchor the
    candidates that are (all others 0).
    """

    truth: str
    direction: str
    anchors: np.ndarray
    candidates: np.ndarray
    teacher: tuple[np.ndarray, np.ndarray] | None  # (a, d_t) and (m, d_t)
    anchor_ids: np.ndarray
    candidate_ids: np.ndarray
    relevance: np.ndarray | Sequence[np.ndarray]

    @property
    def graded(self) -> bool:
        return isinstance(self.relevance, np.ndarray)

    def tiles(self, regulation: Regulation) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield tiles of anchors: (t, m) float64 log weights, (t, m) bool negatives, (t, m) float32 relevance."""
        for start in range(0, len(self.anchors), _ROWS):
            rows = slice(start, start + _ROWS)
            cosine = (self.anchors[rows] @ self.candidates.T).astype(np.float64)
            theirs = None
            if self.teacher is not None and regulation.teacher:
                theirs = torch.from_numpy((self.teacher[0][rows] @ self.teacher[1].T).astype(np.float64))
            negatives = np.ones(cosine.shape, bool)
            for mine, other in zip(self.anchor_ids[rows].T, self.candidate_ids.T, strict=True):
                negatives &= mine[:, None] != other[None, :]
            weights = log_weights(torch.from_numpy(cosine), torch.from_numpy(negatives), regulation, theirs)
            yield weights.numpy(), negatives, self._relevance(rows)

    def _relevance(self, rows: slice) -> np.ndarray:
        if isinstance(self.relevance, np.ndarray):
            return self.relevance[rows]
        listed = self.relevance[rows]
        made = np.zeros((len(listed), len(self.candidates)), np.float32)
        for row, positions in enumerate(listed):
            made[row, positions] = 1.0
        return made


def questions(pairs: Pairs) -> list[GradedNegatives]:
    """Return the known truths about these pairs: built-in scenes, or COCO's test split. Raises UserError for others."""
    if pairs.shards and set(pairs.shards) == {COCO}:
        return _of_coco(pairs)
    places = [place_of(key) for key in pairs.keys]
    if set(pairs.shards) <= {""} and all(places):
        return _of_scenes(pairs, [place for place in places if place])
    raise UserError(
        "the truth is known of the built-in scenes and, with --coco, of COCO's test split; not of these pairs"
    )


def _of_scenes(pairs: Pairs, places: Sequence[tuple[int, int]]) -> list[GradedNegatives]:
    """Build the questions of scenes: one caption each, graded by the share of its statements that hold in a picture."""
    said: list[Caption] = []
    drawn: list[Scene] = []
    sets: dict[int, Scenes] = {}
    for key, (seed, index), text in zip(pairs.keys, places, pairs.captions, strict=True):
        scenes = sets.setdefault(seed, Scenes(10**9, seed))
        caption = next((caption for caption in scenes.captions(index) if caption.text == text), None)
        if caption is None:
            raise UserError(f"scene {key} has no caption {text!r}: the features are of another version of the scenes")
        said.append(caption)
        drawn.append(scenes.scene(index))
    holds = relevance(said, drawn)
    t_image, t_text = pairs.teacher or (None, None)
    ids = pairs.pair_ids
    return [
        GradedNegatives("scenes", "image_to_text", pairs.image, pairs.text, _both(t_image, t_text), ids, ids, holds.T),
        GradedNegatives("scenes", "text_to_image", pairs.text, pairs.image, _both(t_text, t_image), ids, ids, holds),
    ]


def _of_coco(pairs: Pairs) -> list[GradedNegatives]:
    """Build the questions of ECCV Caption (its queries alone) and CxC, of the package eccv_caption.

    A row is a caption with its image.
    """
    names = [key.split("-") for key in pairs.keys]
    image_ids, caption_ids = (np.array([int(name[part]) for name in names]) for part in (0, 1))
    images, first = np.unique(image_ids, return_index=True)
    place_of_image = {int(image): place for place, image in enumerate(images)}
    place_of_caption = {int(caption): place for place, caption in enumerate(caption_ids)}
    t_image, t_text = pairs.teacher or (None, None)
    t_unique = None if t_image is None else t_image[first]
    found = []
    for truth, known in _verified().items():
        positives, rows = _listed(known["i2t"], place_of_image, place_of_caption)
        found.append(
            GradedNegatives(
                truth,
                "image_to_text",
                pairs.image[first][rows],
                pairs.text,
                _both(None if t_unique is None else t_unique[rows], t_text),
                images[rows][:, None],
                image_ids[:, None],
                positives,
            )
        )
        positives, rows = _listed(known["t2i"], place_of_caption, place_of_image)
        found.append(
            GradedNegatives(
                truth,
                "text_to_image",
                pairs.text[rows],
                pairs.image[first],
                _both(None if t_text is None else t_text[rows], t_unique),
                image_ids[rows][:, None],
                images[:, None],
                positives,
            )
        )
    return found


def _verified() -> Mapping[str, Mapping[str, Mapping[int, Sequence[int]]]]:
    """Read the verified matches: {truth: {'i2t': {image: captions}, 't2i': {caption: images}}}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about packages that only make it faster
        try:
            from eccv_caption import Metrics  # type: ignore[import-untyped,import-not-found]
        except ImportError:
            raise UserError(
                "--coco needs the package eccv_caption, which holds the truth: pip install eccv_caption"
            ) from None
        metrics: Any = Metrics()
    return {"ECCV Caption": metrics.eccv_gts, "CxC": metrics.cxc_gts}


def _listed(
    known: Mapping[int, Sequence[int]], anchors: Mapping[int, int], candidates: Mapping[int, int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Positions of the candidates that are right for each anchor that is asked about, and the anchors' positions."""
    asked = [anchor for anchor in known if anchor in anchors]
    if not asked:
        raise UserError("none of the verified images and captions is among these pairs; give COCO's whole test split")
    positives = [np.array([candidates[each] for each in known[anchor] if each in candidates], int) for anchor in asked]
    return positives, np.array([anchors[anchor] for anchor in asked])


def _both(a: np.ndarray | None, b: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
    return None if a is None or b is None else (a, b)
