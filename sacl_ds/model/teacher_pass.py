"""Pass of a teacher over whole shards, for the files of `sacl_ds.data.teacher_features`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sacl_ds.data.batch import View
from sacl_ds.data.collate import stacked
from sacl_ds.data.images import BadImage
from sacl_ds.data.sample import BadSample
from sacl_ds.data.shards.reading import RawSample
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.data.teacher_features import ShardFeatures
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.errors import UserError
from sacl_ds.model.teacher import Teacher

Seen = tuple[int, Tensor | None, list[str]]  # fingerprint, pixels, captions of a sample; 0, None, []: it cannot be used


def shard_features(
    teacher: Teacher,
    source: ShardSource,
    shard: int,
    device: torch.device,
    batch_size: int,
    threads: int,
    seen: Callable[[int], None] = lambda count: None,
) -> ShardFeatures:
    """Compute the features of all samples of a shard, `batch_size` images and as many captions at a time.

    seen(n): called after every n samples. Raises UserError where the shard cannot be read to its end, and where
    features are not finite.
    """
    made = ShardFeatures([], [], [], [])
    for part in _batches(_look(teacher.view, source, shard, threads), batch_size):
        pixels = [image for _, image, _ in part if image is not None]
        images = iter(_rows(teacher.image_features(stacked(pixels).to(device))) if pixels else ())
        for fingerprint, image, captions in part:
            made.samples.append(fingerprint)
            made.captions.append(len(captions))
            made.image.append(next(images) if image is not None else np.zeros(0, np.float16))
        made.text += _texts(teacher, [caption for _, _, said in part for caption in said], device, batch_size)
        seen(len(part))
    for what, rows in (("images", made.image), ("captions", made.text)):
        if not all(np.isfinite(row).all() for row in rows):
            raise UserError(
                f"{source.shards[shard]}: the teacher's features of its {what} are not finite; give another teacher"
            )
    return made


def _look(view: View, source: ShardSource, shard: int, threads: int) -> Iterator[Seen]:
    """Decode the samples in their order, by several threads."""

    def one(raw: RawSample) -> Seen:
        try:
            sample = source.decode(raw)
            return sample.fingerprint, view.image(sample.picture, ()), sample.captions
        except (BadSample, BadImage):
            return 0, None, []

    waiting: deque[Future[Seen]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for raw in source.whole(shard):
            waiting.append(pool.submit(one, raw))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(samples: Iterator[Seen], size: int) -> Iterator[list[Seen]]:
    part: list[Seen] = []
    for sample in samples:
        part.append(sample)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _texts(teacher: Teacher, captions: list[str], device: torch.device, batch_size: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for start in range(0, len(captions), batch_size):
        rows = teacher.view.tokenizer.ids(captions[start : start + batch_size])
        ids, mask = pad(rows, teacher.view.tokenizer.pad_id), attention_mask(rows)
        found += _rows(teacher.text_features(*(torch.from_numpy(array).to(device) for array in (ids, mask))))
    return found


def _rows(features: Tensor) -> list[np.ndarray]:
    return list(features.to(torch.float16).cpu().numpy())
