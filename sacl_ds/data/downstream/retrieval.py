"""Examples of retrieval: image files with captions; a caption each for training, an image each for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from sacl_ds.data.captions import BadText, require_unicode
from sacl_ds.data.downstream.examples import ImageFile
from sacl_ds.data.karpathy import karpathy_split
from sacl_ds.data.sample import Sample
from sacl_ds.errors import UserError


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """Image file with its captions. key: what names the image, in error lines too. cocoid, sentids: COCO's names of it
    and of its captions."""

    image: ImageFile
    captions: list[str]
    key: str
    cocoid: int | None = None
    sentids: list[int] | None = None


def karpathy_images(json: Path, folder: Path, split: str) -> list[CaptionedImage]:
    """List one split of Karpathy's JSON (COCO, Flickr30k, Flickr8k), images under `folder`; 'train' takes 'restval'
    too.

    An image is looked for at folder/filepath/filename, then at folder/filename, when it is used. Raises UserError, with
    file and entry, for what is no such JSON, an empty split, an image without captions, and one that stands in it
    twice.
    """
    images, seen = [], dict[str, int]()
    for entry in karpathy_split(json, split):
        captions = [caption.strip() for caption in entry.captions]
        here = f"{json}: images[{entry.number}] ({entry.filename})"
        if not captions or not all(captions):
            what = f"sentences[{captions.index('')}] is empty" if captions else "it has no sentences"
            raise UserError(f"{here}: {what}; put it right, or leave it out")
        for number, caption in enumerate(captions):
            try:
                require_unicode(caption)
            except BadText as error:
                raise UserError(f"{here}: sentences[{number}]: {error}; put it right, or leave it out") from None
        key = f"{entry.filepath}/{entry.filename}" if entry.filepath else entry.filename
        if seen.setdefault(key, entry.number) != entry.number:
            raise UserError(f"{here}: it stands there twice, before as images[{seen[key]}]; leave one out")
        file = ImageFile(f"image {key}", entry.places(folder))
        images.append(CaptionedImage(file, captions, key, entry.cocoid, entry.sentids))
    return images


def as_sample(image: CaptionedImage) -> Sample:
    """Read an image with all its captions. Raises BadSample where the file is missing or no image."""
    return _sample(image, image.captions)


class EvaluationImages(Sequence[Sample]):
    """Evaluation examples, one an image, read when asked for; that raises BadSample like `as_sample`."""

    def __init__(self, images: Sequence[CaptionedImage]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return EvaluationImages(self.images[index])
        return as_sample(self.images[index])


class TrainingPairs(Sequence[Sample]):
    """Training pairs, a caption each, so that an epoch is all captions; read when asked for, which raises BadSample.

    What identifies the image is its key, not its bytes: all captions of an image get the same first pair id from
    `Collator`, and are never negatives of each other.
    """

    def __init__(self, images: Sequence[CaptionedImage]) -> None:
        self.images = images
        self._places = [(i, j) for i, image in enumerate(images) for j in range(len(image.captions))]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        image, caption = self._places[index]
        return _sample(self.images[image], [self.images[image].captions[caption]])


def _sample(image: CaptionedImage, captions: list[str]) -> Sample:
    return Sample(image.key, image.image.picture(), captions, list(range(len(captions))), image.key.encode())
