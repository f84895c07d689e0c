"""A batch of image-text pairs as the model takes it, and how it is made from samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sacl_ds.data.draws import words
from sacl_ds.data.sample import Sample
from sacl_ds.data.text import IGNORED, Tokenizer, attention_mask, mask_tokens, pad

_IMAGE, _CAPTION, _MASK = range(3)


@dataclass(frozen=True)
class Batch:
    """b pairs. L is the longest caption of the batch; L_t the longest for the teacher's tokenizer.

    The teacher's fields are None where there is no teacher, or where it sees just what the model sees.
    """

    keys: list[str]
    images: Tensor  # (b, 3, H, W) uint8
    input_ids: Tensor  # (b, L) int64
    attention_mask: Tensor  # (b, L) int64
    pair_ids: Tensor  # (b, 1) int64; a match means that two pairs are not negatives of each other
    masked_ids: Tensor | None = None  # (b, L) int64
    mlm_labels: Tensor | None = None  # (b, L) int64, IGNORED where nothing is predicted
    teacher_images: Tensor | None = None  # (b, 3, H_t, W_t) uint8
    teacher_input_ids: Tensor | None = None  # (b, L_t) int64
    teacher_attention_mask: Tensor | None = None  # (b, L_t) int64

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]


def concatenate(batches: Sequence[Batch], pad_id: int, teacher_pad_id: int = 0) -> Batch:
    """The pairs of several batches, in order, padded to the longest of them."""
    if len(batches) == 1:
        return batches[0]
    padding = {"input_ids": pad_id, "masked_ids": pad_id, "mlm_labels": IGNORED, "teacher_input_ids": teacher_pad_id}
    joined: dict[str, Tensor | None] = {}
    for field in fields(Batch):
        parts = [getattr(batch, field.name) for batch in batches]
        if field.name == "keys":
            continue
        if parts[0] is None:
            joined[field.name] = None
            continue
        if parts[0].ndim == 2 and field.name != "pair_ids":
            longest = max(part.shape[1] for part in parts)
            fill = padding.get(field.name, 0)
            parts = [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
        joined[field.name] = torch.cat(parts)
    return Batch(keys=[key for batch in batches for key in batch.keys], **joined)  # type: ignore[arg-type]


class ImageView(Protocol):
    @property
    def size(self) -> int:
        """Pixels a side."""

    def __call__(self, image: Image.Image, entropy: tuple[int, ...]) -> Tensor:
        """(3, size, size) uint8, drawn from `entropy` alone."""


class TextView(Protocol):
    @property
    def pad_id(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Equal for two that give every caption the same ids."""

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids, cut to the model's length, not padded."""


@dataclass(frozen=True)
class View:
    """How a model that is not trained sees a sample: teacher, evaluation."""

    image: ImageView
    tokenizer: TextView

    def same_images(self, other: View) -> bool:
        return self.image == other.image

    def same_text(self, other: View) -> bool:
        return self.tokenizer.fingerprint == other.tokenizer.fingerprint


@dataclass(frozen=True)
class TrainingView(View):
    """How the model that is trained sees it: its tokenizer can also mask."""

    tokenizer: Tokenizer


@dataclass(frozen=True)
class Collator:
    """Samples to a `Batch`. What is random about a sample is drawn from (seed, epoch, its key), on any rank alike."""

    view: TrainingView
    seed: int
    mlm_probability: float | None  # None: no masked copy
    teacher: View | None = None

    def __call__(self, samples: Sequence[Sample], epochs: Sequence[int]) -> Batch:
        keys = [_hash64(sample.key.encode()) for sample in samples]
        draws = [(self.seed, epoch, key) for epoch, key in zip(epochs, keys, strict=True)]
        captions = [_pick(sample.captions, (*draw, _CAPTION)) for sample, draw in zip(samples, draws, strict=True)]
        rows = self.view.tokenizer.ids(captions)
        pad_id = self.view.tokenizer.pad_id
        masked = labels = None
        if self.mlm_probability is not None:
            pairs = [
                mask_tokens(row, self.view.tokenizer, self.mlm_probability, (*draw, _MASK))
                for row, draw in zip(rows, draws, strict=True)
            ]
            masked = torch.from_numpy(pad([ids for ids, _ in pairs], pad_id))
            labels = torch.from_numpy(pad([label for _, label in pairs], IGNORED))
        image_ids = [_hash64(sample.image_bytes) for sample in samples]
        batch = Batch(
            keys=[sample.key for sample in samples],
            images=self._images(self.view, samples, draws),
            input_ids=torch.from_numpy(pad(rows, pad_id)),
            attention_mask=torch.from_numpy(attention_mask(rows)),
            pair_ids=torch.from_numpy(np.array(image_ids, np.uint64).view(np.int64))[:, None],
            masked_ids=masked,
            mlm_labels=labels,
        )
        if self.teacher is None:
            return batch
        if not self.teacher.same_images(self.view):
            batch = replace(batch, teacher_images=self._images(self.teacher, samples, draws))
        if not self.teacher.same_text(self.view):
            rows = self.teacher.tokenizer.ids(captions)
            ids = torch.from_numpy(pad(rows, self.teacher.tokenizer.pad_id))
            mask = torch.from_numpy(attention_mask(rows))
            batch = replace(batch, teacher_input_ids=ids, teacher_attention_mask=mask)
        return batch

    def _images(self, view: View, samples: Sequence[Sample], draws: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.stack(
            [view.image(sample.image, (*draw, _IMAGE)) for sample, draw in zip(samples, draws, strict=True)]
        )


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _pick(captions: Sequence[str], entropy: tuple[int, ...]) -> str:
    if len(captions) == 1:
        return captions[0]
    return captions[words(1, *entropy)[0] % len(captions)]
