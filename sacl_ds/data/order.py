"""The global order of samples: a pure function of (seed, how many samples, global batch), never of ranks or workers.

The global batch of a step has B slots. They are dealt to C *streams* (the largest divisor of B that is at most the
configured number), slot s to stream s * C // B, so that each stream serves B / C neighbouring slots. An epoch's
samples, arranged shard by shard in an order drawn for that epoch, are cut into C stretches, one a stream; stretches
differ by one sample at most, and over epochs they even out. Within its stretch a stream shuffles blocks of samples.

So the position *is* the step: any rank, worker or resumed run computes from the step alone which samples its slots
hold, every sample appears exactly once per epoch, and a shard is read front to back by a stream or two.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sacl_ds.data.draws import permutation


@dataclass(frozen=True, slots=True)
class Place:
    """One sample at one moment of training."""

    epoch: int
    shard: int
    offset: int  # within the shard


class GlobalOrder:
    """Which sample stands in which slot of which step."""

    def __init__(
        self,
        shard_counts: Sequence[int],
        global_batch_size: int,
        seed: int,
        streams: int = 16,
        shuffle_buffer: int = 2048,
    ) -> None:
        """shard_counts: samples per shard, in the order of the shard list; streams, shuffle_buffer: see DataConfig."""
        self.counts = np.asarray(shard_counts, np.int64)
        self.total = int(self.counts.sum())
        if self.total < 1:
            raise ValueError("no samples to order")
        self.batch, self.seed, self.block = global_batch_size, seed, shuffle_buffer
        self.streams = max(c for c in range(1, min(streams, global_batch_size) + 1) if global_batch_size % c == 0)
        self.slots_per_stream = global_batch_size // self.streams

    def stream_of(self, slot: int) -> int:
        return slot // self.slots_per_stream

    def _cut(self, stream: int, epoch: int) -> int:
        """How many samples streams 0..stream-1 have together served after epochs 0..epoch-1."""
        return self.total * epoch * stream // self.streams

    def _stretch(self, stream: int, epoch: int) -> tuple[int, int]:
        """(first, length) of a stream's part of the epoch, in the epoch's arrangement of all samples."""
        ends = [
            self._cut(s, epoch + 1) - self._cut(s, epoch) for s in (stream, stream + 1)
        ]  # both are cumulative over streams, so stretches of an epoch adjoin and cover it
        return ends[0], ends[1] - ends[0]

    def _served_before(self, stream: int, epoch: int) -> int:
        """Samples that the stream serves in epochs 0..epoch-1."""
        return self._cut(stream + 1, epoch) - self._cut(stream, epoch)

    def epoch_at(self, stream: int, position: int) -> int:
        """The epoch in which a stream serves its sample number `position`."""
        epoch = position * self.streams // self.total
        while self._served_before(stream, epoch + 1) <= position:
            epoch += 1
        while epoch and self._served_before(stream, epoch) > position:
            epoch -= 1
        return epoch

    def blocks(self, stream: int, position: int = 0) -> Iterator[tuple[list[Place], list[int], int]]:
        """A stream's samples from its number `position` on, for ever, block by block.

        Yields (places, order, skip): `places` in the order in which they lie in the shards, to be read front to back;
        they are served as places[order[skip]], places[order[skip + 1]], ...; skip is 0 but for the first block.
        """
        epoch = self.epoch_at(stream, position)
        done = position - self._served_before(stream, epoch)
        while True:
            first, length = self._stretch(stream, epoch)
            arrangement = permutation(len(self.counts), self.seed, epoch)
            ends = np.cumsum(self.counts[arrangement]).tolist()
            while done < length:
                number, skip = divmod(done, self.block)
                start = number * self.block
                size = min(self.block, length - start)
                places = self._places(first + start, size, epoch, arrangement, ends)
                order = permutation(size, self.seed, epoch, stream, number).tolist()
                yield places, order, skip
                done = start + size
            epoch, done = epoch + 1, 0

    def _places(self, first: int, size: int, epoch: int, arrangement: np.ndarray, ends: list[int]) -> list[Place]:
        places: list[Place] = []
        row = bisect.bisect_right(ends, first)
        while len(places) < size:
            shard = int(arrangement[row])
            offset = first + len(places) - (ends[row] - int(self.counts[shard]))
            take = min(size - len(places), int(self.counts[shard]) - offset)
            places += [Place(epoch, shard, offset + i) for i in range(take)]
            row += 1
        return places
