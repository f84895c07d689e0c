"""Collation of samples to a `Batch`. What is random about a sample is drawn from (seed, epoch, its key), on any rank
alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from sacl_ds.data.batch import Batch, TrainingView, View, concatenate
from sacl_ds.data.captions import normalised
from sacl_ds.data.draws import hash64, words
from sacl_ds.data.images import BadImage
from sacl_ds.data.order import Place
from sacl_ds.data.sample import BadSample, Sample, SampleFault
from sacl_ds.data.text import IGNORED, attention_mask, mask_tokens, pad

if TYPE_CHECKING:  # few runs have one
    from sacl_ds.data.grouping import Grouping

_IMAGE, _CAPTION, _MASK = range(3)


class StoredFeatures(Protocol):
    """Interface of a teacher's precomputed features."""

    def of(self, place: Place, sample: Sample, caption: int) -> np.ndarray:
        """Return (2, d_t) float16: the features of the image, and of its caption number `caption`."""


@dataclass(frozen=True, slots=True)
class Item:
    """Transformed sample, before it is collated."""

    key: str
    shard: str
    draw: tuple[int, int, int]
    caption: str
    image: Tensor  # (3, H, W) uint8
    teacher_image: Tensor | None
    teacher_features: np.ndarray | None
    ids: list[int]


@dataclass(frozen=True)
class Collator:
    view: TrainingView
    seed: int
    mlm_probability: float | None  # None: no masked copy
    teacher: View | None = None
    features: StoredFeatures | None = None  # in the place of a teacher that looks
    duplicates: Literal["image+caption", "image", "none"] = "image+caption"
    grouping: Grouping | None = None

    def item(self, sample: Sample, place: Place) -> Item:
        """Raises BadSample where the image is damaged."""
        draw = (self.seed, place.epoch, hash64(sample.key.encode()))
        which = sample.wanted[words(1, *draw, _CAPTION)[0] % len(sample.wanted)]
        caption = sample.captions[which]
        look = self.teacher is not None and not self.teacher.same_images(self.view)
        try:
            image = self.view.image_with(caption)(sample.picture, (*draw, _IMAGE))
            teacher_image = self.teacher.image(sample.picture, (*draw, _IMAGE)) if self.teacher and look else None
        except BadImage as error:
            raise BadSample(sample.fault(f"the image cannot be decoded: {error}")) from None
        features = self.features.of(place, sample, which) if self.features else None
        return Item(sample.key, sample.shard, draw, caption, image, teacher_image, features, self._ids(sample, caption))

    def __call__(self, items: Sequence[Item], faults: Sequence[SampleFault] = ()) -> Batch:
        """Collate items to a batch. faults: samples that some of these stand in for."""
        tokenizer = self.view.tokenizer
        captions = [item.caption for item in items]
        rows = tokenizer.ids(captions)
        masked = labels = None
        if self.mlm_probability is not None:
            pairs = [
                mask_tokens(row, tokenizer, self.mlm_probability, (*item.draw, _MASK))
                for row, item in zip(rows, items, strict=True)
            ]
            masked = torch.from_numpy(pad([ids for ids, _ in pairs], tokenizer.pad_id))
            labels = torch.from_numpy(pad([label for _, label in pairs], IGNORED))
        mask = attention_mask(rows)
        batch = Batch(
            keys=[item.key for item in items],
            captions=captions,
            shards=[item.shard for item in items],
            images=stacked([item.image for item in items]),
            input_ids=torch.from_numpy(pad(rows, tokenizer.pad_id)),
            attention_mask=torch.from_numpy(mask),
            pair_ids=torch.from_numpy(np.array([item.ids for item in items], np.uint64).view(np.int64)),
            masked_ids=masked,
            mlm_labels=labels,
            token_places=torch.from_numpy(np.flatnonzero(mask)),
            mlm_places=None if labels is None else torch.from_numpy(np.flatnonzero(labels.numpy() != IGNORED)),
            faults=list(faults),
        )
        if items[0].teacher_features is not None:
            features = np.stack([item.teacher_features for item in items if item.teacher_features is not None])
            return replace(batch, teacher_features=torch.from_numpy(features))
        if self.teacher is None:
            return batch
        if items[0].teacher_image is not None:
            images = [item.teacher_image for item in items if item.teacher_image is not None]
            batch = replace(batch, teacher_images=stacked(images))
        if not self.teacher.same_text(self.view):
            rows = self.teacher.tokenizer.ids(captions)
            ids = torch.from_numpy(pad(rows, self.teacher.tokenizer.pad_id))
            of_teacher = torch.from_numpy(attention_mask(rows))
            batch = replace(batch, teacher_input_ids=ids, teacher_attention_mask=of_teacher)
        return batch

    def join(self, parts: Sequence[Batch]) -> Batch:
        teacher = self.teacher or self.view
        return concatenate(parts, self.view.tokenizer.pad_id, teacher.tokenizer.pad_id)

    @property
    def id_columns(self) -> int:
        """Number of ids a pair has."""
        return 1 + (self.duplicates == "image+caption") + (self.grouping is not None)

    def _ids(self, sample: Sample, caption: str) -> list[int]:
        """Return a pair's ids: pairs that share one are no negatives of each other."""
        ids = [hash64(sample.key.encode() if self.duplicates == "none" else sample.image_bytes)]
        if self.duplicates == "image+caption":
            ids.append(hash64(normalised(caption).encode()))
        if self.grouping is not None:
            ids.append(self.grouping.id_of(sample.shard, sample.key))
        return ids


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Stack images to (b, 3, H, W), in their own memory format; in a worker, in shared memory."""
    joined: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return joined.permute(0, 3, 1, 2)
