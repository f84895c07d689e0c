"""COCO's test split under a model and its teacher: what ECCV Caption and CxC have verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sacl_ds.analysis.pairs import Pairs
from sacl_ds.analysis.subject import Subject
from sacl_ds.analysis.truth import COCO
from sacl_ds.data.batch import View
from sacl_ds.data.images import BadImage
from sacl_ds.data.karpathy import KarpathyImage, karpathy_split
from sacl_ds.data.pictures import Picture
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError


@dataclass(frozen=True)
class CocoImage:
    """An image of the test split; captions: (sentid, text)."""

    cocoid: int
    path: Path
    captions: list[tuple[int, str]]


def coco_images(annotations: Path, images: Path) -> list[CocoImage]:
    """The test split of Karpathy's dataset_coco.json. Raises UserError for another file, or missing images."""
    found = []
    for entry in karpathy_split(annotations, "test"):
        if entry.cocoid is None or entry.sentids is None:
            lacks = "cocoid" if entry.cocoid is None else "sentid"
            raise UserError(f"--coco {annotations} is not Karpathy's dataset_coco.json (no {lacks}); give that file")
        captions = list(zip(entry.sentids, entry.captions, strict=True))
        found.append(CocoImage(entry.cocoid, _path(images, entry), captions))
    return found


@torch.no_grad()
def coco_pairs(
    subject: Subject, found: Sequence[CocoImage], batch_size: int, done: Callable[[int], None] = lambda count: None
) -> Pairs:
    """A pair for each caption, with its image's features; the key is COCOID-SENTID. done(n): images encoded.

    Raises UserError for an image that cannot be decoded.
    """
    own = View(CanonicalView(subject.run.model.image_size), subject.tokenizer)
    teacher, device = subject.teacher, subject.device
    image: list[np.ndarray] = []
    teacher_image: list[np.ndarray] = []
    for start in range(0, len(found), batch_size):
        part = found[start : start + batch_size]
        pictures = [_picture(each) for each in part]
        image.append(_array(subject.model.encode_image(_stack(own, part, pictures).to(device))[1]))
        if teacher is not None:
            teacher_image.append(_array(teacher.image_features(_stack(teacher.view, part, pictures).to(device))))
        done(len(part))
    captions = [caption for each in found for _, caption in each.captions]
    text: list[np.ndarray] = []
    teacher_text: list[np.ndarray] = []
    for start in range(0, len(captions), batch_size):
        said = captions[start : start + batch_size]
        text.append(_array(subject.model.encode_text(*_tokens(own, said, device))[1]))
        if teacher is not None:
            teacher_text.append(_array(teacher.text_features(*_tokens(teacher.view, said, device))))
    rows = [row for row, each in enumerate(found) for _ in each.captions]
    ids = np.array([[found[row].cocoid] for row in rows], np.int64)
    return Pairs(
        keys=[f"{each.cocoid}-{sentid}" for each in found for sentid, _ in each.captions],
        shards=[COCO] * len(captions),
        captions=captions,
        image=np.concatenate(image)[rows],
        text=np.concatenate(text),
        teacher_image=np.concatenate(teacher_image)[rows] if teacher_image else None,
        teacher_text=np.concatenate(teacher_text) if teacher_text else None,
        pair_ids=ids,
        logit_scale=float(subject.model.logit_scale().float()),
    )


def _path(images: Path, entry: KarpathyImage) -> Path:
    places = entry.places(images)
    for path in places:
        if path.is_file():
            return path
    raise UserError(
        f"--images {images}: neither {' nor '.join(map(str, places))} exists; give the folder of COCO's images"
    )


def _picture(each: CocoImage) -> Picture:
    try:
        return Picture(each.path.read_bytes())
    except (BadImage, OSError) as error:
        raise UserError(f"{each.path} cannot be decoded: {error}") from None


def _stack(view: View, part: Sequence[CocoImage], pictures: Sequence[Picture]) -> Tensor:
    made = []
    for each, picture in zip(part, pictures, strict=True):
        try:
            made.append(view.image(picture, ()))
        except BadImage as error:
            raise UserError(f"{each.path} cannot be decoded: {error}") from None
    return torch.stack(made)


def _tokens(view: View, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = view.tokenizer.ids(captions)
    ids, mask = (torch.from_numpy(each).to(device) for each in (pad(rows, view.tokenizer.pad_id), attention_mask(rows)))
    return ids, mask


def _array(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()
