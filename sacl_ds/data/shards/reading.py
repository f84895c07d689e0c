"""Reading of undecoded samples from shards by place; an unreadable one becomes a fault, and those after it go on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sacl_ds.data.order import Block, Place
from sacl_ds.data.sample import SampleFault
from sacl_ds.data.shards.opening import Heart, ShardCache, Stream, open_shard, reason
from sacl_ds.data.shards.patterns import is_remote
from sacl_ds.data.shards.tars import BadShard, samples_of, start_of

_PAUSES = (0.5, 2.0, 8.0)  # seconds before the second attempt, the third, and all others


@dataclass(frozen=True, slots=True)
class RawSample:
    """Sample as it lies in its shard: fields by extension, and '__key__'."""

    shard: str
    place: Place
    fields: dict[str, Any]


class ShardReading:
    """The wanted samples of blocks as a `Reading`: a fault in place of each that cannot be read.

    A shard is opened where the first of its places lies. Where that can help, one that fails is opened again and read
    up to where it failed; else its remaining places are faults until the blocks come back to it.
    """

    def __init__(
        self,
        shards: Sequence[str],
        blocks: Iterator[Block],
        attempts: int,
        stall_seconds: float,
        cache: ShardCache | None,
    ) -> None:
        self.heart = Heart()
        self._shards, self._blocks, self._cache = shards, blocks, cache
        self._attempts, self._stall_seconds = attempts, stall_seconds
        self._number = -1  # of the shard it stands in
        self._next = 0  # the sample that comes next there
        self._stream: Stream | None = None
        self._samples: Iterator[dict[str, Any]] | None = None
        self._tries = 0
        self._failed: str | None = None

    @property
    def shard(self) -> str:
        return self._shards[self._number]

    def __iter__(self) -> Iterator[RawSample | SampleFault]:
        try:
            block = next(self._blocks, None)
            while block is not None:
                following = next(self._blocks, None)
                self._prefetch(block, following)
                for place in block.places:
                    yield self._at(place)
                block = following
        finally:
            self._leave()

    def _at(self, place: Place) -> RawSample | SampleFault:
        if place.shard != self._number or place.offset < self._next:
            self._leave()
            self._number, self._tries, self._failed = place.shard, 0, None
        while self._failed is None:
            if self.heart.stopped:
                return SampleFault("bad", self.shard, "", "closed")
            self.heart.beat()
            try:
                raw = RawSample(self.shard, place, self._forward(place.offset))
            except OSError as error:
                self._leave()
                if self._cache and isinstance(error, BadShard):
                    self._cache.forget(self.shard)  # it may have come damaged
                self._tries += 1
                if self._tries < self._attempts and _may_pass(error, self.shard):
                    self._pause()
                else:
                    self._failed = reason(error)
            else:
                self._tries = 0
                return raw
        return SampleFault("bad", self.shard, "", self._failed)

    def _forward(self, offset: int) -> dict[str, Any]:
        if self._samples is None:
            self._open(offset)
        assert self._samples is not None
        while True:
            fields = next(self._samples, None)
            if fields is None:
                raise BadShard(f"it ends or is damaged after {self._next} samples, fewer than its index says")
            self._next += 1
            if self._next > offset:
                return fields

    def _open(self, offset: int) -> None:
        self._next = 0
        opener = self._cache.open if self._cache and is_remote(self.shard) else open_shard
        self._stream = opener(self.shard, self.heart, self._stall_seconds)
        if self._stream.file is not None and offset:
            byte, self._next = start_of(self._stream.file, offset, self.heart)
            self._stream.file.seek(byte)
        self._samples = samples_of(self._stream)

    def _leave(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._samples = None, None

    def _pause(self) -> None:
        until = time.monotonic() + _PAUSES[min(self._tries, len(_PAUSES)) - 1]
        while time.monotonic() < until:
            self.heart.beat()
            time.sleep(min(0.1, max(0.0, until - time.monotonic())))

    def _prefetch(self, block: Block, following: Block | None) -> None:
        if self._cache is None or following is None:
            return
        for shard in {place.shard for place in following.places} - {place.shard for place in block.places}:
            if is_remote(self._shards[shard]):
                self._cache.prefetch(self._shards[shard], self._stall_seconds)


def _may_pass(error: OSError, shard: str) -> bool:
    """Return whether trying again can help: with servers always; not with a file that is gone or damaged."""
    return is_remote(shard) or not isinstance(error, (BadShard, FileNotFoundError, PermissionError))
