"""Retrieval as a task: images with captions, a caption each for training, an image each for evaluation; its gallery."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image
from torch import nn

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.batch import Batch, TrainingView, View
from sacl_ds.data.captions import BadText, require_unicode
from sacl_ds.data.collate import Collator
from sacl_ds.data.karpathy import karpathy_split, karpathy_splits
from sacl_ds.data.sample import Sample
from sacl_ds.data.scenes import SceneSource
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.evaluation.ranking import Listed, Ranking
from sacl_ds.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from sacl_ds.evaluation.rounds import CocoIds, RetrievalSet, pictures_of
from sacl_ds.files import write_text
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.examples import ExampleSource, ImageFile, images_folder, scenes_of
from sacl_ds.tasks.task import EvaluationContext, Outcome, Task
from sacl_ds.telemetry.sheet import MARKED, PLAIN, Tile, draw_rows
from sacl_ds.training.objective import PretrainObjective
from sacl_ds.training.step import Losses, Step, contrastive_step

TOP = 5

Pictures = Callable[[Sequence[int]], Mapping[int, Image.Image]]  # by numbers in the source


def draw_gallery(
    ranking: Ranking, pictures: Pictures, path: Path, texts: Sequence[int] | None = None, count: int = 4
) -> list[int]:
    """Write a PNG of each text's first five images, the right ones framed; below, the re-ranked order if there is one.

    pictures: reads the images of these numbers in the source, without those that cannot be read (`pictures_of`). texts:
    which texts; None: the `count` whose first right image moves most by re-ranking, up or down in turn (`telling`).
    Returns the texts that were drawn. Raises UserError for a text that is not there, or a file that cannot be written.
    """
    chosen = telling(ranking, count) if texts is None else list(texts)
    if unknown := [text for text in chosen if not 0 <= text < len(ranking.captions)]:
        raise UserError(f"{path}: no text {unknown[0]} to draw; there are 0 to {len(ranking.captions) - 1}")
    stages = [("by features", ranking.text_to_image), ("re-ranked", ranking.reranked_text_to_image)]
    drawn = [(name, listed) for name, listed in stages if listed is not None]
    places = {int(place) for _, listed in drawn for text in chosen for place in listed.order[text, :TOP]}
    found = pictures([int(ranking.numbers[place]) for place in sorted(places)])
    rows = []
    for text in chosen:
        for name, listed in drawn:
            tiles = [_tile(ranking, listed, text, rank, found) for rank in range(min(TOP, listed.order.shape[1]))]
            rows.append((f"“{ranking.captions[text]}” · {name}", tiles))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_rows(rows, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return chosen


def telling(ranking: Ranking, count: int) -> list[int]:
    """Texts that show most: those whose first right image re-ranking moves furthest, improved and spoilt in turn.

    Without re-ranking, those whose first right image stands among the first ten, as far behind as possible. At most one
    text of an image, none in the same words twice, and in the order of the texts where nothing tells them apart.
    """
    first, second = ranking.text_to_image, ranking.reranked_text_to_image
    before = _places(first)
    if second is None:
        keys = np.where(before < first.order.shape[1], before, -1)
        orders = [np.argsort(-keys, kind="stable")]
    else:
        gain = before - _places(second)
        orders = [np.argsort(-gain, kind="stable"), np.argsort(gain, kind="stable")]
    chosen: list[int] = []
    shown: set[int | str] = set()
    # which of the orders gives the next one, and where each stands
    queues = [iter(order.tolist()) for order in orders]
    while len(chosen) < count:
        queue = queues[len(chosen) % len(queues)]
        new = (text for text in queue if shown.isdisjoint((int(ranking.owner[text]), ranking.captions[text])))
        text = next(new, None)
        if text is None:
            break
        chosen.append(text)
        shown |= {int(ranking.owner[text]), ranking.captions[text]}
    return chosen


def _places(listed: Listed) -> np.ndarray:
    """Return (q,) ranks of each query's first right candidate, as `Listed.place`."""
    return np.array([listed.place(query) for query in range(len(listed.order))])


def _tile(ranking: Ranking, listed: Listed, text: int, rank: int, found: Mapping[int, Image.Image]) -> Tile:
    place, right = int(listed.order[text, rank]), bool(listed.right[text, rank])
    own = place == ranking.owner[text]
    said = "its own image" if own else "right" if right else ""
    figures = [f"{rank + 1}. {said}".rstrip()]
    picture = found.get(int(ranking.numbers[place]))
    return Tile(picture, (ranking.keys[place],), figures, MARKED if right else PLAIN)


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


class RetrievalOutcome:
    """Outcome of a retrieval: metrics, notes, and files to write: rankings.jsonl and gallery.png."""

    def __init__(self, result: RetrievalResult, data: RetrievalSet, gallery: int) -> None:
        self.figures, self.notes = result.figures, result.notes
        self._ranking, self._data, self._gallery = result.ranking, data, gallery

    def write(self, folder: Path) -> list[Path]:
        rankings = folder / "rankings.jsonl"
        write_text(rankings, "".join(json.dumps(line) + "\n" for line in self._ranking.lines()))
        if not self._gallery:
            return [rankings]
        picture = folder / "gallery.png"
        draw_gallery(self._ranking, lambda numbers: pictures_of(self._data, numbers), picture, count=self._gallery)
        return [rankings, picture]


class RetrievalTask(Task):
    rows = "pairs"
    origin = ""

    def __init__(self, run: FinetuneConfig) -> None:
        super().__init__(run)
        self._images = cache(self._read)

    @property
    def main(self) -> str:
        figure = "text_to_image_any_R@1" if self._scenes else "mean_recall"
        return f"reranked_{figure}" if self.run.retrieval.rerank else figure

    @property
    def _scenes(self) -> bool:
        return self.run.data.source == "scenes"

    def count(self, split: str) -> int:
        if self._scenes:
            return len(scenes_of(self.run, split))
        if self.run.retrieval.annotations is None:
            return 0
        return len(TrainingPairs(self._images(split))) if split == "train" else len(self._images(split))

    def _read(self, split: str) -> Sequence[CaptionedImage]:
        """Read a split of the Karpathy JSON; empty where it lacks the val or test split."""
        settings = self.run.retrieval
        name = {"train": settings.train_split, "val": settings.val_split, "test": settings.test_split}[split]
        assert settings.annotations is not None
        file = Path(settings.annotations)
        folder = images_folder(self.run)
        if split != "train" and name not in karpathy_splits(file):
            return []
        return karpathy_images(file, folder, name)

    def texts(self) -> Iterator[str]:
        if self._scenes:
            return SceneSource(scenes_of(self.run, "train")).captions(100_000)
        return (caption for image in self._images("train") for caption in image.captions)

    def training(self, tokenizer: Tokenizer) -> tuple[Any, Collator]:
        view = self.training_view()
        collator = Collator(TrainingView(view, tokenizer, view.for_text), self.run.seed, None)
        if self._scenes:
            return SceneSource(scenes_of(self.run, "train")), collator
        pairs: Sequence[Sample] = TrainingPairs(self._images("train"))
        return ExampleSource(pairs), collator

    def model(self, start: SaclModel, tokenizer: Tokenizer) -> SaclModel:
        return start

    def objective(self, model: SaclModel) -> nn.Module:
        return PretrainObjective(model, self.run.loss)

    def forward_backward(self, engine: Any, batch: Batch, step: Step) -> Losses:
        """Run a step without a teacher: the model's own similarity regulates (the paper's fine-tuning)."""
        return contrastive_step(engine, batch, replace(step, statistics=step.logged))[0]

    def evaluate(self, model: SaclModel, split: str, seen: EvaluationContext) -> Outcome:
        data = self._set(split, seen.limit)
        view = View(self.held_out_view(), seen.tokenizer)
        settings = self.run.retrieval
        result = evaluate_retrieval(
            model, data, view, seen.device, self.run.batch_size, settings.rerank, seen.done, settings.rerank_similarity
        )
        return RetrievalOutcome(result, data, settings.gallery)

    def _set(self, split: str, limit: int | None) -> RetrievalSet:
        if self._scenes:
            scenes = scenes_of(self.run, split)
            count = min(len(scenes), limit or len(scenes))
            satisfying = scenes.relevance() == 1
            return RetrievalSet(SceneSource(scenes), count, satisfying[: count * scenes.captions_per_scene, :count])
        images = self._images(split)
        if not images:
            raise UserError(f"retrieval.annotations={self.run.retrieval.annotations} has no split for {split}")
        return retrieval_set(images[:limit], self.run.data.max_bad_share)


def retrieval_set(
    images: Sequence[CaptionedImage], max_bad_share: float, setting: str = "data.max_bad_share"
) -> RetrievalSet:
    """Make the retrieval set of a list of image files; with COCO's names where all of them have some."""
    sentids = [each.sentids for each in images]
    cocoids = [each.cocoid for each in images if each.cocoid is not None]
    coco = None
    if len(cocoids) == len(images) and all(ids is not None for ids in sentids):
        coco = CocoIds(np.array(cocoids, np.int64), np.array([i for ids in sentids for i in ids or ()], np.int64))
    source = ExampleSource(EvaluationImages(images))
    return RetrievalSet(source, len(images), None, coco, max_bad_share, setting)
