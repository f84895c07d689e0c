"""Evaluation in rounds on all ranks: each reads its part once, and all run equally many passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from sacl_ds.data.batch import View
from sacl_ds.data.images import BadImage
from sacl_ds.data.order import Block, Place
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import BadSample, Sample, SampleFault, Source
from sacl_ds.distributed import gather_objects, raise_on_all_ranks, rank, world_size
from sacl_ds.errors import SharedError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_READERS = 4  # threads; decoding lets go of the interpreter's lock


class Rounds(NamedTuple, Generic[Result]):
    """Results of all examples. results: one an example, in order, equal on all ranks; None where it could not be read.
    faults: why not."""

    results: list[Result | None]
    faults: list[SampleFault]


def in_rounds(
    count: int,
    batch_size: int,
    read: Callable[[int], Item],
    run: Callable[[Sequence[Item]], Sequence[Result]],
    filler: Item,
    done: Callable[[int], None] = lambda examples: None,
) -> Rounds[Result]:
    """Apply `run` to examples 0 .. count - 1, each read and run on one rank; every rank calls it.

    read(number) raises BadSample for an example that cannot be used. run: a batch of at most batch_size to one result
    each, which must not depend on what else is in the batch. Under ZeRO 3 a pass is collective, so ranks with fewer
    batches run `filler`, and what comes of it is thrown away. done(n): n examples more are done on this rank.
    """
    mine = range(rank(), count, world_size())
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    rounds = -(-len(range(0, count, world_size())) // batch_size)
    results: list[tuple[int, Result]] = []
    faults: list[SampleFault] = []

    def attempt(number: int) -> Item | SampleFault:
        try:
            return read(number)
        except BadSample as error:
            return error.fault

    with ThreadPoolExecutor(_READERS) as pool:

        def start(turn: int) -> list[Future[Item | SampleFault]]:
            return [pool.submit(attempt, number) for number in batches[turn]] if turn < len(batches) else []

        coming = start(0)
        for turn in range(rounds):
            read_now, coming = coming, start(turn + 1)
            told = [each.result() for each in read_now]
            numbers = batches[turn] if turn < len(batches) else range(0)
            good = [(n, each) for n, each in zip(numbers, told, strict=True) if not isinstance(each, SampleFault)]
            faults += [each for each in told if isinstance(each, SampleFault)]
            given = run([each for _, each in good] or [filler])
            if good:
                results += zip((number for number, _ in good), given, strict=True)
            done(len(told))
    merged: list[Result | None] = [None] * count
    all_faults: list[SampleFault] = []
    for part, wrong in gather_objects((results, faults)):
        all_faults += wrong
        for number, result in part:
            merged[number] = result
    return Rounds(merged, all_faults)


def require_few(
    faults: Sequence[SampleFault], count: int, most: float, setting: str = "data.max_bad_share"
) -> str | None:
    """Count and name examples that could not be used, in a line; None where there is none. Raises SharedError, on every
    rank alike, where they are more than the share `most` of `count`."""
    if not faults:
        return None
    named = "; ".join(map(str, faults[:3])) + ("; ..." if len(faults) > 3 else "")
    line = f"{len(faults)} of {count} examples cannot be used: {named}"
    if len(faults) > most * count:
        raise SharedError(f"{line}; that is more than {setting}={most:g}: put the files there, or raise it")
    return line


def require_finite(values: np.ndarray, names: Sequence[str], what: str) -> None:
    """Raise SharedError, on every rank alike, where a value is NaN or infinite: what is ranked by it says nothing.

    values: (n,) or (n, d), of examples with these names, the same on every rank. what: they are called.
    """
    finite = np.isfinite(values.reshape(len(names), -1)).all(1) if names else np.ones(0, bool)
    wrong = np.flatnonzero(~finite)
    if len(wrong):
        raise SharedError(
            f"{what} of {len(wrong)} of {len(names)} examples are not finite, those of {names[wrong[0]]!r} for one: "
            "the model is damaged, or overflows in this precision; take another checkpoint, or train.precision=fp32"
        )


Done = Callable[[str, int, int], None]  # (stage, done of it, all of it) on this rank


def unseen(stage: str, count: int, total: int) -> None:
    """Ignore progress: a `Done` that shows nothing."""


@dataclass(frozen=True)
class CocoIds:
    """COCO's ids of the set, in its order. images: (n,) int64 cocoid; captions: (m,) int64 sentid."""

    images: np.ndarray
    captions: np.ndarray


@dataclass(frozen=True)
class RetrievalSet:
    """First `count` images of a source with all their captions, and which captions are true of which images.

    satisfying: (captions, images) bool, where it is known of all pairs (scenes); None: only a caption's own image is.
    coco: where the set is of COCO. max_bad_share: of the images, how many may be missing or damaged: they are left out
    with their captions. setting: what to raise where it is more, '' for a set that must be whole.
    """

    source: Source
    count: int
    satisfying: np.ndarray | None = None
    coco: CocoIds | None = None
    max_bad_share: float = 0.0
    setting: str = ""

    def __post_init__(self) -> None:
        there = sum(sum(shards) for shards in self.source.sets)
        if not 1 <= self.count <= there:
            raise ValueError(f"count={self.count} of a source of {there} images")

    @property
    def mine(self) -> range:
        """Numbers of this rank's images: every world-th."""
        return range(rank(), self.count, world_size())


class LoadedImage(NamedTuple):
    """Transformed image, (3, size, size) uint8, and its number in the source."""

    number: int
    key: str
    captions: list[str]
    image: Tensor


@dataclass
class ImageRounds:
    """Rounds over this rank's images, at most batch_size each, equally many on every rank; a round may be empty.

    The next round is read while one is used. What cannot be read is left out, and stands in `faults`. Every rank goes
    through all rounds; where reading failed altogether on one of them, all raise its UserError at the end, since a rank
    that stopped in between would leave the others waiting.
    """

    data: RetrievalSet
    view: View
    batch_size: int
    faults: list[SampleFault] = field(default_factory=list)

    def __len__(self) -> int:
        return math.ceil(len(range(0, self.data.count, world_size())) / self.batch_size)

    def __iter__(self) -> Iterator[list[LoadedImage]]:
        failed: str | None = None
        parts = self._parts()
        for _ in range(len(self)):
            part: list[LoadedImage | SampleFault] = []
            if failed is None:
                try:
                    part = next(parts)
                except UserError as error:
                    failed = str(error)
            self.faults += [each for each in part if isinstance(each, SampleFault)]
            yield [each for each in part if isinstance(each, LoadedImage)]
        parts.close()
        with raise_on_all_ranks():
            if failed is not None:
                raise UserError(failed)

    def _parts(self) -> Generator[list[LoadedImage | SampleFault], None, None]:
        mine, view, source = self.data.mine, self.view, self.data.source
        samples = source.read(_blocks(source, mine))

        def look(number: int, raw: object) -> LoadedImage | SampleFault:
            sample = _decoded(source, raw)
            if isinstance(sample, SampleFault):
                return sample
            try:
                return LoadedImage(number, sample.key, sample.captions, view.image(sample.picture, ()))
            except BadImage as error:
                return sample.fault(f"the image cannot be decoded: {error}")

        def start(turn: int) -> list[Future[LoadedImage | SampleFault]]:
            numbers = mine[turn * self.batch_size : (turn + 1) * self.batch_size]
            return [pool.submit(look, number, next(samples)) for number in numbers]

        try:
            with ThreadPoolExecutor(_READERS) as pool:
                coming = start(0)
                for turn in range(len(self)):
                    now, coming = coming, start(turn + 1)
                    yield [each.result() for each in now]
        finally:
            samples.close()


def pictures_of(data: RetrievalSet, numbers: Sequence[int]) -> dict[int, Image.Image]:
    """Read the images of these numbers, whole; those that cannot be read are left out."""
    wanted = sorted(set(numbers))
    samples = data.source.read(_blocks(data.source, wanted))
    found = {}
    try:
        for number in wanted:
            sample = _decoded(data.source, next(samples))
            if isinstance(sample, Sample) and (image := _whole(sample.picture)) is not None:
                found[number] = image
    finally:
        samples.close()
    return found


def _whole(picture: Picture) -> Image.Image | None:
    try:
        return Image.fromarray(picture.pixels().permute(1, 2, 0).numpy())
    except BadImage:
        return None


def _decoded(source: Source, raw: object) -> Sample | SampleFault:
    if isinstance(raw, SampleFault):
        return raw
    try:
        return source.decode(raw)
    except BadSample as error:
        return error.fault


def _blocks(source: Source, numbers: Sequence[int]) -> Iterator[Block]:
    """Yield the places of the samples with these ascending numbers, a block a shard."""
    first, shard, position = 0, 0, 0
    for counts in source.sets:
        for count in counts:
            places = []
            while position < len(numbers) and numbers[position] < first + count:
                places.append(Place(0, shard, numbers[position] - first))
                position += 1
            if places:
                yield Block(places, list(range(len(places))))
            first, shard = first + count, shard + 1
