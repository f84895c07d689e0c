"""The global order of samples: a pure function of (seed, sets of shards, global batch), never of ranks or workers.

The global batch of a step has B slots. They are dealt to C *streams* (the largest divisor of B that is at most the
configured number), slot s to stream s * C // B, so that each stream serves w = B / C neighbouring slots. An epoch's
samples, arranged shard by shard in an order drawn for that epoch, are cut into C stretches, one a stream; stretches
differ by one sample at most, and over C epochs each stream serves the same number. Within its stretch a stream shuffles
blocks of samples.

Several sets with weights: a stream serves them in turn, by a cycle in which each set stands as often as its weight
says; each set has its own epochs, stretches and blocks.

So the position *is* the step: any rank, worker or resumed run computes from the step alone which samples its slots
hold, every sample of a set appears exactly once in each of its epochs, and a shard is read front to back by a stream
or two.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np

from sacl_ds.data.draws import permutation, words

_LONGEST_CYCLE = 10_000


@dataclass(frozen=True, slots=True)
class Place:
    """Sample at one moment of training: its epoch, shard and position."""

    epoch: int
    shard: int
    offset: int  # within the shard


@dataclass(frozen=True, slots=True)
class Block:
    """Samples of one set that a stream shuffles together, of which a reader wants some.

    places: the wanted ones, in the order in which they lie in the shards. They are served as places[serve[0]],
    places[serve[1]], ...
    """

    places: list[Place]
    serve: list[int]


class GlobalOrder:
    """Assignment of samples to the slots of all steps."""

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        global_batch_size: int,
        seed: int,
        streams: int = 64,
        shuffle_buffer: int = 32768,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Lay out the streams over the sets.

        sets: for each set, the samples of each of its shards; shards are numbered through all sets.

        weights: each set's share of every batch, up to a factor; None for a single set. streams, shuffle_buffer: see
        DataConfig. Raises ValueError for a set without samples.
        """
        self.batch, self.seed = global_batch_size, seed
        self.streams = max(c for c in range(1, min(streams, global_batch_size) + 1) if global_batch_size % c == 0)
        self.slots_per_stream = global_batch_size // self.streams
        shares = [1.0] if weights is None else [weight / sum(weights) for weight in weights]
        self._cycle = Cycle(shares if weights is None else weights)
        self._sets: list[_Set] = []
        first = 0
        for number, (counts, share) in enumerate(zip(sets, shares, strict=True)):
            block = max(1, math.ceil(shuffle_buffer / self.streams * share))
            apart = math.ceil(self.slots_per_stream * share)
            self._sets.append(_Set(counts, first, seed, number, self.streams, block, apart))
            first += len(counts)

    @property
    def fingerprint(self) -> str:
        """Digest that is equal for two orders that serve the same places at the same steps."""
        says = [self.batch, self.seed, self.streams, self._cycle.of.tolist()]
        says += [[s.block, s.apart, s.counts.tolist()] for s in self._sets]
        return hashlib.sha256(json.dumps(says).encode()).hexdigest()

    def stream_of(self, slot: int) -> int:
        return slot // self.slots_per_stream

    def sets(self, stream: int, position: int = 0) -> Iterator[int]:
        """Yield the set that a stream serves from at each of its positions, from `position` on, for ever."""
        turn = self._cycle.turn(stream, self.streams)
        while True:
            yield turn.set_at(position)
            position += 1

    def blocks(
        self, stream: int, number: int, position: int = 0, low: int = 0, high: int | None = None
    ) -> Iterator[Block]:
        """Yield the blocks that a stream serves of set `number` from the stream's position on, for ever.

        Only at positions p with low <= p mod w < high, w being the stream's slots in a step.
        """
        width = self.slots_per_stream
        high = width if high is None else high
        turn = self._cycle.turn(stream, self.streams)
        served = turn.served_before(position, number)
        for places, order, skip in self._sets[number].blocks(stream, served):
            rest = order[skip:]
            slots = turn.positions(number, served, len(rest)) % width
            wanted = rest[(slots >= low) & (slots < high)]
            served += len(rest)
            lie = np.sort(wanted)
            yield Block(places(lie), np.searchsorted(lie, wanted).tolist())

    def substitute(self, place: Place, stream: int, position: int, attempt: int) -> Place:
        """Draw a substitute for an unusable sample, from its own set, by (seed, epoch, slot, attempt).

        Neighbouring slots draw from the same few samples at the beginning of one shard, so that a shard that is gone
        costs one other shard's opening and not thousands.
        """
        number = bisect.bisect_right([s.first for s in self._sets], place.shard) - 1
        return self._sets[number].substitute(place.epoch, stream, position, attempt)


class Cycle:
    """Cycle over sets: of its `length` positions, set m has `counts[m]`, evenly spread."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Weights of at most four decimals or so are kept exactly; finer ones are rounded to a cycle of 10,000."""
        exact = [Fraction(str(weight)) for weight in weights]
        total = sum(exact)
        shares = [weight / total for weight in exact]
        self.length = min(_LONGEST_CYCLE, math.lcm(*(share.denominator for share in shares)))
        ends = np.array([int(sum(shares[: m + 1]) * self.length + Fraction(1, 2)) for m in range(len(shares))])
        self.counts = np.diff(ends, prepend=0)
        if not self.counts.all():
            raise ValueError("a weight too small to be served")
        # the k-th time of set m belongs at (k + 1/2) / counts[m] of the cycle
        wish = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        self.of = np.repeat(np.arange(len(shares)), self.counts)[np.argsort(wish, kind="stable")]

    def turn(self, stream: int, streams: int) -> Turn:
        """Return the cycle as a stream goes through it: each begins at another point."""
        return Turn(np.roll(self.of, -(self.length * stream // streams)), self.counts)


class Turn:
    def __init__(self, of: np.ndarray, counts: np.ndarray) -> None:
        self.of, self.counts = of, counts
        self._sets = of.tolist()
        self._at = [np.flatnonzero(of == m) for m in range(len(counts))]

    def set_at(self, position: int) -> int:
        return self._sets[position % len(self._sets)]

    def served_before(self, position: int, number: int) -> int:
        """Count the positions before `position` that are set `number`'s."""
        whole, rest = divmod(position, len(self.of))
        return whole * int(self.counts[number]) + int(np.searchsorted(self._at[number], rest))

    def positions(self, number: int, first: int, count: int) -> np.ndarray:
        """(count,) int64: positions at which the set is served for the first-th and the following times."""
        times = np.arange(first, first + count)
        whole, rest = np.divmod(times, max(1, int(self.counts[number])))
        return whole * len(self.of) + self._at[number][rest]


class _Set:
    """Order of one set: epochs, stretches, blocks."""

    def __init__(
        self, counts: Sequence[int], first: int, seed: int, number: int, streams: int, block: int, apart: int
    ) -> None:
        """Lay out a set. first: its first shard's number; apart: serving positions between neighbours."""
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        if self.total < 1:
            raise ValueError("no samples to order")
        self.first, self.streams, self.block, self.apart = first, streams, block, apart
        self.entropy = (seed, number)

    def _starts(self, stream: int) -> np.ndarray:
        """(streams,) int64: where the stream's stretch starts in each of `streams` epochs, after which they repeat.

        The remainder that the division leaves goes to other streams in each epoch; sum_r floor((x + r) / n) = x over
        r = 0 .. n-1, so every stream serves `total` samples in `streams` epochs.
        """
        step = next(
            s for s in range(round(0.618 * self.streams) or 1, self.streams + 2) if math.gcd(s, self.streams) == 1
        )
        return (self.total * stream + np.arange(self.streams) * step % self.streams) // self.streams

    @cache  # noqa: B019 - of a handful of streams, as long as the order lives
    def _served(self, stream: int) -> np.ndarray:
        """(streams + 1,) int64: samples that the stream serves before each epoch of a period, and in a whole one."""
        return np.concatenate([[0], np.cumsum(self._starts(stream + 1) - self._starts(stream))])

    def _stretch(self, stream: int, epoch: int) -> tuple[int, int]:
        """(first, length) of a stream's part of the epoch, in the epoch's arrangement of all samples."""
        number = epoch % self.streams
        served = self._served(stream)
        return int(self._starts(stream)[number]), int(served[number + 1] - served[number])

    def epoch_at(self, stream: int, position: int) -> tuple[int, int]:
        """Return the epoch of a stream's sample number `position` in this set, and how many of it come before."""
        periods, rest = divmod(position, self.total)
        served = self._served(stream)
        number = int(np.searchsorted(served, rest, side="right")) - 1
        return periods * self.streams + number, rest - int(served[number])

    def blocks(self, stream: int, position: int) -> Iterator[tuple[_Places, np.ndarray, int]]:
        """Yield (places, order, skip) of each block, which is served as its samples order[skip], order[skip + 1], ...

        skip is 0 but for the first block.
        """
        epoch, done = self.epoch_at(stream, position)
        while True:
            first, length = self._stretch(stream, epoch)
            arrangement = permutation(len(self.counts), *self.entropy, epoch)
            ends = np.cumsum(self.counts[arrangement])
            while done < length:
                number, skip = divmod(done, self.block)
                start = number * self.block
                size = min(self.block, length - start)
                order = spread(size, self.apart, *self.entropy, epoch, stream, number)
                yield _Places(self, first + start, epoch, arrangement, ends), order, skip
                done = start + size
            epoch, done = epoch + 1, 0

    def substitute(self, epoch: int, stream: int, position: int, attempt: int) -> Place:
        shared, own = (
            words(1, *self.entropy, epoch, stream, at, tries)[0]
            for at, tries in ((position // SUBSTITUTES, attempt // TRIES_IN_A_SHARD), (position, attempt))
        )
        ends = np.cumsum(self.counts)
        shard = int(np.searchsorted(ends, shared % self.total, side="right"))
        return Place(epoch, self.first + shard, own % min(int(self.counts[shard]), SUBSTITUTES))


SUBSTITUTES = 256  # samples at the beginning of a shard that stand in for others
TRIES_IN_A_SHARD = 25


@dataclass(frozen=True, slots=True)
class _Places:
    """Function from sample indices of a block to their places (epoch, shard, offset)."""

    of: _Set
    first: int
    epoch: int
    arrangement: np.ndarray
    ends: np.ndarray

    def __call__(self, indices: np.ndarray) -> list[Place]:
        samples = self.first + indices
        rows = np.searchsorted(self.ends, samples, side="right")
        shards = self.arrangement[rows]
        offsets = samples - (self.ends[rows] - self.of.counts[shards])
        pairs = zip(shards.tolist(), offsets.tolist(), strict=True)
        return [Place(self.epoch, self.of.first + shard, offset) for shard, offset in pairs]


def spread(count: int, apart: int, *entropy: int) -> np.ndarray:
    """(count,) int64: a random permutation that serves neighbours at least `apart` positions from each other.

    The samples are cut into `apart` stretches, each is shuffled, and one of each is served in turn, so what lies in
    one stretch never stands in one batch. Exceptions are the pairs on both sides of a cut.
    """
    parts = min(apart, count)
    turns = -(-count // max(1, parts))
    long = count - parts * (turns - 1)  # stretches that have a sample for the last turn, too; served first
    arranged = permutation(parts, *entropy)  # arranged[k]: which stretch is served k-th
    length = np.full(parts, turns - 1)
    length[arranged[:long]] = turns
    starts = np.cumsum(length) - length
    order = np.empty(count, np.int64)
    for k, stretch in enumerate(arranged.tolist()):
        order[k::parts] = starts[stretch] + permutation(int(length[stretch]), *entropy, stretch)
    return order
