"""Held-out retrieval by features: every rank encodes its part once; scores and metrics on the whole set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sacl_ds.data.batch import View
from sacl_ds.data.images import BadImage
from sacl_ds.data.sample import Source
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.distributed import gather_objects, rank, same_error, world_size
from sacl_ds.errors import UserError
from sacl_ds.evaluation.metrics import (
    chance_mean_average_precision,
    chance_recall_at_k,
    mean_average_precision,
    recall_at_k,
)
from sacl_ds.model.sacl import SaclModel

KS = (1, 5, 10)
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class RetrievalSet:
    """Images with their captions, and which captions are true of which images.

    satisfying: (captions, images) bool, where it is known of all pairs (scenes); None: only a caption's own image is.
    """

    source: Source
    count: int
    satisfying: np.ndarray | None = None


@torch.no_grad()
def features(
    model: SaclModel, data: RetrievalSet, view: View, device: torch.device, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit features of images (n, d) and captions (m, d), float32, and each caption's image (m,), on every rank.

    Ranks take every world-th image. Each runs the same number of forward passes, whatever its share: under ZeRO 3
    every pass is collective. Padding passes are thrown away.
    """
    images: list[Tensor] = []
    captions: list[list[str]] = []
    with same_error():
        for sample in data.source.iterate(data.count, rank(), world_size()):
            try:
                images.append(view.image(sample.picture, ()))
            except BadImage as error:
                raise UserError(str(sample.fault(f"the image cannot be decoded: {error}"))) from None
            captions.append(sample.captions)
    rows = view.tokenizer.ids([caption for said in captions for caption in said])
    pad_id = view.tokenizer.pad_id
    example = (
        torch.zeros_like(images[0]) if images else torch.zeros(3, view.image.size, view.image.size).byte(),
        [pad_id],
    )

    def encode_images(part: Sequence[Tensor]) -> Tensor:
        return model.encode_image(torch.stack(list(part)).to(device))[1]

    def encode_texts(part: Sequence[list[int]]) -> Tensor:
        ids, mask = (torch.from_numpy(array).to(device) for array in (pad(part, pad_id), attention_mask(part)))
        return model.encode_text(ids, mask)[1]

    image_features = _encode(images, encode_images, batch_size, example[0])
    text_features = _encode(rows, encode_texts, batch_size, example[1])
    parts = gather_objects((image_features, text_features, list(map(len, captions))))
    return _interleave(parts)


def _encode(
    items: Sequence[_Item], encode: Callable[[Sequence[_Item]], Tensor], batch_size: int, filler: _Item
) -> np.ndarray:
    chunks = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    rounds = max(gather_objects(len(chunks)))
    done = [encode(chunk).float().cpu().numpy() for chunk in chunks]
    for _ in range(rounds - len(chunks)):
        encode([filler])
    return np.concatenate(done) if done else np.empty((0, 0), np.float32)


def _interleave(parts: list[tuple[np.ndarray, np.ndarray, list[int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Back to the stored order of images, from ranks that took every world-th."""
    world = len(parts)
    total = sum(len(counts) for _, _, counts in parts)
    starts = [np.concatenate([[0], np.cumsum(counts)]).astype(int) for _, _, counts in parts]
    images, texts, owners = [], [], []
    for number in range(total):
        part_images, part_texts, _ = parts[number % world]
        row = number // world
        images.append(part_images[row])
        begin, end = starts[number % world][row : row + 2]
        texts.append(part_texts[begin:end])
        owners += [number] * (end - begin)
    return np.stack(images), np.concatenate(texts), np.array(owners)


def retrieval_metrics(
    image: np.ndarray, text: np.ndarray, owner: np.ndarray, satisfying: np.ndarray | None
) -> dict[str, tuple[float, float]]:
    """{name: (value, chance)}, fractions. image (n, d), text (m, d), owner (m,): each caption's image."""
    scores = text @ image.T
    own = np.zeros(scores.shape, bool)
    own[np.arange(len(owner)), owner] = True
    table: dict[str, tuple[float, float]] = {}
    if satisfying is not None:
        value, chance = recall_at_k(scores, satisfying, (1,)), chance_recall_at_k(satisfying, (1,))
        table["text_to_image_any_R@1"] = value[1], chance[1]
        table["text_to_image_mAP"] = (
            mean_average_precision(scores, satisfying),
            chance_mean_average_precision(satisfying),
        )
    for name, matrix, relevance in (("text_to_image", scores, own), ("image_to_text", scores.T, own.T)):
        values, chances = recall_at_k(matrix, relevance, KS), chance_recall_at_k(relevance, KS)
        table |= {f"{name}_R@{k}": (values[k], chances[k]) for k in KS}
    return table


def evaluate_retrieval(
    model: SaclModel, data: RetrievalSet, view: View, device: torch.device, batch_size: int
) -> dict[str, tuple[float, float]]:
    """Zero-shot retrieval in eval mode; the model's mode is restored. Every rank calls it and gets the same figures."""
    was_training = model.training
    model.eval()
    try:
        image, text, owner = features(model, data, view, device, batch_size)
    finally:
        model.train(was_training)
    return retrieval_metrics(image, text, owner, data.satisfying)
