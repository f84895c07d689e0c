"""Read the samples that the global order assigns to a range of slots, step by step, and replace those that are bad."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

from sacl_ds.data.faults import BadSample, SampleFault
from sacl_ds.data.order import SUBSTITUTES, TRIES_IN_A_SHARD, Block, GlobalOrder, Place
from sacl_ds.data.sample import Sample, Samples, Source
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
