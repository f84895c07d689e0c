"""Data loader: one rank's part of every global batch, made by worker processes.

A worker owns some of the rank's slots and makes them for every step; the main process joins the workers' pieces. So
which samples a global batch holds depends on `GlobalOrder` alone, with any number of ranks and workers.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sacl_ds.data.batch import Moves
from sacl_ds.data.order import SUBSTITUTES, TRIES_IN_A_SHARD, Block, GlobalOrder, Place
from sacl_ds.data.sample import BadSample, Sample, SampleFault, Samples, Source
from sacl_ds.errors import UserError

_TRIES = 8 * TRIES_IN_A_SHARD
_HEADS = 4  # shards whose first samples are kept to stand in for others

Item = TypeVar("Item")


class Feed(Generic[Item]):
    """Items of the slots [begin, end) of each step, from `start_step` on.

    make: makes an item from a sample and its place; raises BadSample for one that cannot be used. The slot then gets
    another sample, always the same one for the same slot.
    """

    def __init__(
        self,
        source: Source,
        order: GlobalOrder,
        make: Callable[[Sample, Place], Item],
        begin: int,
        end: int,
        start_step: int,
    ) -> None:
        self._source, self._order, self._make, self._start = source, order, make, start_step
        self._heads = _Heads(source)
        self._parts: list[_StreamSlots] = []
        width = order.slots_per_stream
        for stream in range(order.stream_of(begin), order.stream_of(end - 1) + 1):
            low, high = max(begin - stream * width, 0), min(end - stream * width, width)
            self._parts.append(_StreamSlots(source, order, stream, low, high, start_step * width))

    def __iter__(self) -> Iterator[tuple[list[Item], list[SampleFault]]]:
        """Yield, for each step, the slots' items and the faults of samples that were replaced."""
        while True:
            items: list[Item] = []
            faults: list[SampleFault] = []
            for part in self._parts:
                for position, place, raw in part.step():
                    items.append(self._use(part.stream, position, place, raw, faults))
            yield items, faults

    def close(self) -> None:
        self._heads.close()
        for part in self._parts:
            part.close()

    def _use(self, stream: int, position: int, place: Place, raw: Any, faults: list[SampleFault]) -> Item:
        first: SampleFault | None = None
        instead = place
        for attempt in range(_TRIES + 1):
            try:
                if isinstance(raw, SampleFault):
                    raise BadSample(raw)
                item = self._make(self._source.decode(raw), instead)
            except BadSample as error:
                first = first or error.fault
                instead = self._order.substitute(place, stream, position, attempt)
                raw = self._heads.sample(instead)
                continue
            if first:
                faults.append(first)
            return item
        assert first is not None
        raise UserError(f"{first}; none of {_TRIES} samples drawn to stand in for it can be used either")


class _StreamSlots:
    """Slots low..high of one stream, step after step."""

    def __init__(self, source: Source, order: GlobalOrder, stream: int, low: int, high: int, position: int) -> None:
        self.stream = stream
        self._source, self._order, self._low, self._high, self._position = source, order, low, high, position
        self._turns = order.sets(stream, position)
        self._served: dict[int, _Shuffled] = {}

    def step(self) -> Iterator[tuple[int, Place, Any]]:
        """Yield (position in the stream, place, undecoded sample or Fault) of each slot of the next step."""
        for slot in range(self._order.slots_per_stream):
            number = next(self._turns)
            if self._low <= slot < self._high:
                if number not in self._served:
                    self._served[number] = self._shuffled(number)
                yield (self._position, *next(self._served[number]))
            self._position += 1

    def close(self) -> None:
        for served in self._served.values():
            served.close()

    def _shuffled(self, number: int) -> _Shuffled:
        def blocks() -> Iterator[Block]:
            return self._order.blocks(self.stream, number, self._position, self._low, self._high)

        return _Shuffled(self._source.read(blocks()), blocks())


class _Shuffled:
    """Samples read front to back, served in the order of their blocks.

    While a block is served the next one is read, one sample for another, so as many samples are held as a block has.
    """

    def __init__(self, samples: Samples, blocks: Iterator[Block]) -> None:
        self._samples, self._serve = samples, self._shuffle(blocks)

    def __next__(self) -> tuple[Place, Any]:
        return next(self._serve)

    def close(self) -> None:
        self._samples.close()

    def _shuffle(self, blocks: Iterator[Block]) -> Iterator[tuple[Place, Any]]:
        """Yield the samples of each block in its order to serve, reading the next block as this one empties."""
        held: list[Any] | None = None
        for block, following in pairwise(blocks):
            if held is None:
                held = [next(self._samples) for _ in block.places]
            coming: list[Any] = []
            for number, index in enumerate(block.serve, 1):
                raw, held[index] = held[index], None
                yield block.places[index], raw
                while len(coming) * len(block.serve) < number * len(following.places):
                    coming.append(next(self._samples))
            coming += [next(self._samples) for _ in range(len(following.places) - len(coming))]
            held = coming


@dataclass
class _Head:
    samples: Samples
    read: list[Any]


class _Heads:
    """Cache of the first samples of a few shards, read as far as they were asked for."""

    def __init__(self, source: Source) -> None:
        self._source, self._heads = source, OrderedDict[int, _Head]()

    def sample(self, place: Place) -> Any | SampleFault:
        head = self._heads.get(place.shard)
        if head is None:
            head = self._heads[place.shard] = _Head(self._source.head(place.shard, SUBSTITUTES), [])
            if len(self._heads) > _HEADS:
                self._heads.popitem(last=False)[1].samples.close()
        self._heads.move_to_end(place.shard)
        while len(head.read) <= place.offset:
            head.read.append(next(head.samples))
        return head.read[place.offset]

    def close(self) -> None:
        for head in self._heads.values():
            head.samples.close()


_GRACE = 25.0  # seconds that a loader works on when asked to end
_PREFETCHED = 4  # pieces a worker makes ahead
# A loader ends when its parent does, and that must be the rank: a server that forks for it (the default of Python 3.14)
# outlives a rank that was killed, and the loader with it.
_START = "fork" if sys.platform.startswith("linux") else None

Made = TypeVar("Made", bound="Loadable")


class Loadable(Moves, Protocol):
    """A batch as the loader makes it and the training loop takes it: tensors whose first dimension are its rows."""

    @property
    def pair_ids(self) -> Tensor:
        """(b, k) int64: ids of the rows, the same in every run."""

    @property
    def faults(self) -> list[SampleFault]:
        """Samples that others of this batch stand in for."""

    def __len__(self) -> int: ...

    def parts(self: Made, rows: int) -> list[Made]:
        """Split the rows in order into micro-batches of `rows`, texts cut to each one's longest."""


class Collates(Protocol[Made]):
    """Interface of collators: decode one sample at a time, then join a piece's items into a batch."""

    def item(self, sample: Any, place: Place) -> Any:
        """Decode and transform a sample to an item. Raises BadSample."""

    def __call__(self, items: Sequence[Any], faults: Sequence[SampleFault] = ()) -> Made: ...

    def join(self, parts: Sequence[Made]) -> Made:
        """Concatenate batches, in order."""


class BatchLoader(Generic[Made]):
    """Iterator over this rank's batches from `start_step` on, for ever."""

    def __init__(
        self,
        source: Source,
        order: GlobalOrder,
        collator: Collates[Made],
        *,
        rank: int,
        world: int,
        workers: int,
        start_step: int = 0,
        pin_memory: bool = False,
    ) -> None:
        per_rank = order.batch // world
        if per_rank * world != order.batch:
            raise ValueError(f"{order.batch} slots do not divide over {world} ranks")
        self.collator, self.pin_memory = collator, pin_memory
        self.pieces = max(1, min(workers, per_rank))
        self._loader: DataLoader[Any] = DataLoader(
            _Pieces(source, order, collator, rank * per_rank, per_rank, start_step),
            batch_size=None,
            num_workers=self.pieces if workers else 0,
            prefetch_factor=_PREFETCHED if workers else None,
            persistent_workers=bool(workers),
            multiprocessing_context=_START if workers else None,
        )

    def __iter__(self) -> Iterator[Made]:
        # DataLoader takes one item from each worker in turn, so `pieces` items in a row make up a step
        pieces = iter(self._loader)
        while True:
            parts: list[Made] = []
            for _ in range(self.pieces):
                part = next(pieces)
                if isinstance(part, str):
                    raise UserError(part)
                parts.append(part)
            batch = self.collator.join(parts)
            yield batch.pin_memory() if self.pin_memory else batch

    def close(self) -> None:
        """End the workers, which would else only do so when they are next asked for something."""
        begun: Any = self._loader._iterator
        if begun is not None and self._loader.num_workers:
            # a worker that was killed is ended as well: torch raises this wherever the process is when it hears of it
            with contextlib.suppress(RuntimeError):
                begun._shutdown_workers()
            for worker in begun._workers:
                worker.kill()


def _outlive_the_launcher() -> None:
    """DeepSpeed's launcher, and a terminal, signal loaders with the run that they feed: that still has steps to make
    until all ranks stop, and then ends them itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.setitimer(signal.ITIMER_REAL, _GRACE))


class _Pieces(IterableDataset[Any]):
    """Iterable of one worker's pieces of this rank's batches: its slots of each step, for ever."""

    def __init__(
        self, source: Source, order: GlobalOrder, collator: Collates[Any], first_slot: int, slots: int, start_step: int
    ) -> None:
        self.source, self.order, self.collator = source, order, collator
        self.first_slot, self.slots, self.start_step = first_slot, slots, start_step

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
            _outlive_the_launcher()
        begin, end = (self.first_slot + self.slots * part // count for part in (number, number + 1))
        feed = Feed(self.source, self.order, self.collator.item, begin, end, self.start_step)
        try:
            for items, faults in feed:
                yield self.collator(items, faults)
        except UserError as error:  # carried as text: a DataLoader would wrap the exception in its own traceback
            yield str(error)
        finally:
            feed.close()
