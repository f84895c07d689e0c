"""Weights of one mini-batch as whole matrices, for inspection cell by cell."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from sacl_ds.analysis.pairs import Pairs
from sacl_ds.losses import Regulation
from sacl_ds.losses.weights import log_weights


@dataclass(frozen=True)
class MiniBatch:
    """Weights of b pairs among each other: float64 (b, b), rows are anchors, 0 where a column is no negative.

    Row i, column j: `image_to_text` image i and text j, `text_to_image` text i and image j. `student`, `teacher`:
    cosines of image i and text j. `negatives`: symmetric, False on the diagonal and for duplicates.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray
    negatives: np.ndarray  # bool
    student: np.ndarray
    teacher: np.ndarray | None

    def weights(self, direction: str) -> np.ndarray:
        return self.image_to_text if direction == "image_to_text" else self.text_to_image


def negatives_of(pair_ids: np.ndarray) -> np.ndarray:
    """(b, b) bool, from (b, k) ids: pairs that share no id in any column."""
    return ~(pair_ids[:, None] == pair_ids[None]).any(-1) & ~np.eye(len(pair_ids), dtype=bool)


def mini_batch(pairs: Pairs, regulation: Regulation) -> MiniBatch:
    """Weights of all `pairs` as one mini-batch, b * b numbers at a time. Without teacher features alpha counts as 0."""
    teacher = None
    if pairs.teacher is not None:
        teacher = _cosine(*pairs.teacher)
    else:
        regulation = replace(regulation, alpha=0.0)
    student, negatives = _cosine(pairs.image, pairs.text), torch.from_numpy(negatives_of(pairs.pair_ids))
    of_images = log_weights(student, negatives, regulation, teacher).exp().numpy()
    of_texts = log_weights(student.T, negatives, regulation, None if teacher is None else teacher.T).exp().numpy()
    of_teacher = None if teacher is None else teacher.numpy()
    return MiniBatch(of_images, of_texts, negatives.numpy(), student.numpy(), of_teacher)


def _cosine(image: np.ndarray, text: np.ndarray) -> torch.Tensor:
    image, text = (np.ascontiguousarray(side, np.float64) for side in (image, text))
    return torch.from_numpy(image) @ torch.from_numpy(text).T
