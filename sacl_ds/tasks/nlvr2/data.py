"""NLVR2 (Suhr et al., ACL 2019), statements about two images: its files, the same task on scenes, and batches.

An identifier reads split-set-pair-sentence. A sentence was written about a set of eight images, which make four pairs;
its statements, equal but for the pair, are what consistency is measured over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from sacl_ds.data.batch import ImageView, Movable, TextView, part_of
from sacl_ds.data.captions import require_unicode
from sacl_ds.data.collate import stacked
from sacl_ds.data.draws import hash64
from sacl_ds.data.images import BadImage
from sacl_ds.data.json_files import each_entry, read_json_lines, require_relative
from sacl_ds.data.order import Place
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import BadSample, SampleFault
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.errors import UserError
from sacl_ds.tasks.examples import ImageFile, SceneImage

PAIRS = 4  # of a set
_IDENTIFIER = re.compile(r"(\w+)-(\d+)-(\d+)-(\d+)")
_LABELS = {"True": True, "False": False}


class Pictured(Protocol):
    """Undecoded image of one side of a pair."""

    def picture(self) -> Picture:
        """Raises BadSample."""


@dataclass(frozen=True, slots=True)
class Statement:
    """Sentence about two images. label: whether it is true of them; None where that is not known (a test set)."""

    identifier: str
    sentence: str
    label: bool | None
    left: Pictured
    right: Pictured

    def views(self, view: ImageView, *entropy: int) -> tuple[Tensor, Tensor]:
        """Transform both images to (3, H, W) uint8, drawn from `entropy` and the side. Raises BadSample."""
        try:
            return view(self.left.picture(), (*entropy, 0)), view(self.right.picture(), (*entropy, 1))
        except BadImage as error:
            raise self.bad(f"an image cannot be decoded: {error}") from None

    def bad(self, reason: str) -> BadSample:
        return BadSample(SampleFault("bad", "", self.identifier, reason))


def nlvr2_statements(file: Path, images: Path) -> list[Statement]:
    """The statements of an official file: a JSON object a line with identifier, sentence, and perhaps label and
    directory.

    images: the folder with {split}-{set}-{pair}-img0.png (left) and -img1.png, right there, or in the folders SPLIT/,
    SPLIT/DIRECTORY/ or DIRECTORY/ of it. Nothing of them is read yet.
    Raises UserError, with the line, for what is malformed, an identifier of another form or that comes twice.
    """
    lines = list(read_json_lines(file))
    seen: dict[str, int] = {}

    def make(numbered: tuple[int, Any]) -> Statement:
        number, entry = numbered
        statement = _statement(entry, images)
        first = seen.setdefault(statement.identifier, number)
        if first != number:
            raise ValueError(f"identifier {statement.identifier} stands in line {first} already; leave one of them out")
        return statement

    statements = each_entry(lines, lambda place: f"{file} line {lines[place][0]}", make)
    if not statements:
        raise UserError(f"{file} holds no statements; give an NLVR2 file, such as dev.json")
    return statements


def _statement(entry: Any, images: Path) -> Statement:
    identifier, sentence, label = entry["identifier"], entry["sentence"], entry.get("label")
    form = _IDENTIFIER.fullmatch(identifier)
    if form is None:
        raise ValueError(f"identifier {identifier!r} is not split-set-pair-sentence, as in dev-850-0-1")
    if not (isinstance(sentence, str) and sentence.strip()):
        raise ValueError(f"sentence {sentence!r} is no text")
    require_unicode(sentence)
    if label is not None and str(label) not in _LABELS:
        raise ValueError(f"label {label!r} is neither True nor False; leave it out where it is not known")
    split, number, pair, _ = form.groups()
    folders = [images, images / split]
    if (directory := entry.get("directory")) is not None:
        require_relative(str(directory))
        folders += [images / split / str(directory), images / str(directory)]

    def side(place: int) -> ImageFile:
        name = f"{split}-{number}-{pair}-img{place}.png"
        return ImageFile(f"image {name.removesuffix('.png')}", tuple(folder / name for folder in folders))

    return Statement(identifier, sentence, None if label is None else _LABELS[str(label)], side(0), side(1))


class SceneStatements(Sequence[Statement]):
    """Statements about scenes, made when read: number i is about scenes 2i and 2i + 1, and a group of its own."""

    def __init__(self, scenes: Scenes) -> None:
        """Raises ValueError for fewer than two scenes."""
        if len(scenes) < 2:
            raise ValueError("a statement about two images needs two scenes")
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes) // 2

    def __getitem__(self, index: int) -> Statement:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"statement {index} of {len(self)}")
        left, right = 2 * index, 2 * index + 1
        sentence, label = self.scenes.pair_statement(left, right)
        sides = (SceneImage(self.scenes, scene) for scene in (left, right))
        return Statement(f"scenes-{index}-0-0", sentence, label, *sides)


def scene_statements(scenes: Scenes) -> list[Statement]:
    """List all of `SceneStatements`, for evaluation: up to four with the same sentence form a group by identifier."""
    said: Counter[str] = Counter()
    groups: dict[tuple[str, int], int] = {}
    grouped = []
    for statement in SceneStatements(scenes):
        turn, pair = divmod(said[statement.sentence], PAIRS)
        said[statement.sentence] += 1
        group = groups.setdefault((statement.sentence, turn), len(groups))
        grouped.append(replace(statement, identifier=f"scenes-{group}-{pair}-0"))
    return grouped


@dataclass(frozen=True)
class StatementBatch(Movable):
    """Batch of b statements. L is the longest of the batch."""

    keys: list[str]  # identifiers
    left: Tensor  # (b, 3, H, W) uint8
    right: Tensor  # (b, 3, H, W) uint8
    input_ids: Tensor  # (b, L) int64
    attention_mask: Tensor  # (b, L) int64
    labels: Tensor  # (b,) int64, 1 where the statement is true
    pair_ids: Tensor  # (b, 1) int64
    faults: list[SampleFault] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def parts(self, rows: int) -> list[StatementBatch]:
        """Split the statements in order into micro-batches of `rows`. Call it on the host: it looks at lengths."""
        texts = {"attention_mask": ("input_ids",)}
        return [StatementBatch(**part_of(self, slice(at, at + rows), texts)) for at in range(0, len(self), rows)]


@dataclass(frozen=True, slots=True)
class StatementItem:
    """Transformed statement, before it is collated."""

    key: str
    sentence: str
    label: bool
    left: Tensor  # (3, H, W) uint8
    right: Tensor  # (3, H, W) uint8


@dataclass(frozen=True)
class StatementCollator:
    """Statements to a `StatementBatch` (`data.loader.Collates`).

    image_view: how images are seen of which this sentence speaks. What is random about a statement is drawn from
    (seed, epoch, its identifier), for both images apart.
    """

    tokenizer: TextView
    image_view: Callable[[str], ImageView]
    seed: int

    def item(self, statement: Statement, place: Place) -> StatementItem:
        """Raises BadSample where an image is missing or damaged, or the label is not known."""
        if statement.label is None:
            raise statement.bad("it has no label to learn from")
        draw = self.seed, place.epoch, hash64(statement.identifier.encode())
        left, right = statement.views(self.image_view(statement.sentence), *draw)
        return StatementItem(statement.identifier, statement.sentence, statement.label, left, right)

    def __call__(self, items: Sequence[StatementItem], faults: Sequence[SampleFault] = ()) -> StatementBatch:
        """Collate items to a batch. faults: statements that some of these stand in for."""
        rows = self.tokenizer.ids([item.sentence for item in items])
        keys = [item.key for item in items]
        return StatementBatch(
            keys=keys,
            left=stacked([item.left for item in items]),
            right=stacked([item.right for item in items]),
            input_ids=torch.from_numpy(pad(rows, self.tokenizer.pad_id)),
            attention_mask=torch.from_numpy(attention_mask(rows)),
            labels=torch.tensor([int(item.label) for item in items]),
            pair_ids=torch.tensor([[_signed(hash64(key.encode()))] for key in keys]),
            faults=list(faults),
        )

    def join(self, parts: Sequence[StatementBatch]) -> StatementBatch:
        """Concatenate batches, padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.input_ids.shape[1] for part in parts)

        def lengthened(rows: Tensor, fill: int) -> Tensor:
            return padded(rows, (0, longest - rows.shape[1]), value=fill)

        return StatementBatch(
            keys=[key for part in parts for key in part.keys],
            left=torch.cat([part.left for part in parts]),
            right=torch.cat([part.right for part in parts]),
            input_ids=torch.cat([lengthened(part.input_ids, self.tokenizer.pad_id) for part in parts]),
            attention_mask=torch.cat([lengthened(part.attention_mask, 0) for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
            pair_ids=torch.cat([part.pair_ids for part in parts]),
            faults=[fault for part in parts for fault in part.faults],
        )


def _signed(word: int) -> int:
    """Reinterpret a word below 2^64 as int64."""
    return word - 2**64 if word >= 2**63 else word
