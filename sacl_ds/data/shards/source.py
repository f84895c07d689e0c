"""Webdataset shards (tars of key.jpg, key.txt, key.json, as img2dataset writes them) as a `Source`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from queue import Empty, Full, Queue
from typing import Generic, Protocol, TypeVar

from sacl_ds.config import DataConfig
from sacl_ds.data.captions import BadText, captions_of, wanted
from sacl_ds.data.images import BadImage
from sacl_ds.data.order import Block, Place
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import BadSample, Sample, SampleFault
from sacl_ds.data.shards.index import ShardIndex
from sacl_ds.data.shards.opening import Heart, ShardCache
from sacl_ds.data.shards.patterns import IMAGE_EXTENSIONS
from sacl_ds.data.shards.reading import RawSample, ShardReading
from sacl_ds.data.shards.tars import PROBLEM, image_of
from sacl_ds.errors import UserError

Item = TypeVar("Item")
Read_co = TypeVar("Read_co", covariant=True)
_CHUNK = 8  # items handed over together at most: changing threads costs as much as reading a small sample
_CHUNKS = 2
_POLL_SECONDS = 0.2


class Reading(Protocol[Read_co]):
    """Iterator that can be watched from another thread."""

    heart: Heart  # beats when bytes come

    @property
    def shard(self) -> str:
        """Path or address of the shard."""

    def __iter__(self) -> Iterator[Read_co]: ...


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class ReadAhead(Generic[Item]):
    """Iterator over `reading`, which runs in a daemon thread until `close`."""

    def __init__(self, reading: Reading[Item], stall_seconds: float) -> None:
        self._reading, self._limit = reading, stall_seconds
        self._chunks: Queue[list[Item] | _End] = Queue(_CHUNKS)
        self._items: deque[Item] = deque()
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """Raises UserError, naming the shard, where nothing has come for twice the limit."""
        if not self._items:
            self._items.extend(self._next_chunk())
        return self._items.popleft()

    def close(self) -> None:
        self._closed.set()
        self._reading.heart.stop()

    def _next_chunk(self) -> list[Item]:
        waiting = Heart()
        while True:
            try:
                chunk = self._chunks.get(timeout=min(_POLL_SECONDS, self._limit / 4))
            except Empty:
                self._watch(min(waiting.still_for, self._reading.heart.still_for))
                continue
            if isinstance(chunk, _End):
                self._chunks.put(chunk)
                if chunk.error is not None:
                    raise chunk.error
                raise StopIteration
            return chunk

    def _watch(self, still: float) -> None:
        if still > 2 * self._limit:  # what can be broken off has been
            raise UserError(
                f"shard {self._reading.shard} has given nothing for {still:.0f} s "
                f"(data.stall_seconds={self._limit:g}); look at the disk or server that it lies on"
            )

    def _run(self) -> None:
        end = _End(None)
        chunk: list[Item] = []
        try:
            for item in self._reading:
                chunk.append(item)
                # one who waits gets it at once
                if len(chunk) == _CHUNK or self._chunks.empty():
                    if not self._put(chunk):
                        return
                    chunk = []
        except BaseException as error:  # carried over to the thread that reads
            end = _End(error)
        if not chunk or self._put(chunk):
            self._put(end)

    def _put(self, chunk: list[Item] | _End) -> bool:
        while not self._closed.is_set():
            try:
                self._chunks.put(chunk, timeout=_POLL_SECONDS)
                return True
            except Full:
                continue
        return False


class ShardSource:
    """Source over the shards of an index, read as the data configuration says."""

    def __init__(self, index: ShardIndex, data: DataConfig | None = None) -> None:
        data = DataConfig() if data is None else data
        self.shards, self.sets, self.weights = index.shards, index.sets, data.weights
        self._counts = index.counts
        self._attempts, self._stall_seconds, self._only = data.attempts, data.stall_seconds, data.captions
        self._cache = ShardCache.of(data.cache_dir, data.cache_gb)

    def read(self, blocks: Iterator[Block]) -> ReadAhead[RawSample | SampleFault]:
        return ReadAhead(
            ShardReading(self.shards, blocks, self._attempts, self._stall_seconds, self._cache), self._stall_seconds
        )

    def head(self, shard: int, count: int) -> ReadAhead[RawSample | SampleFault]:
        places = [Place(0, shard, offset) for offset in range(min(count, self._counts[shard]))]
        return self.read(iter([Block(places, [])]))

    def whole(self, shard: int, to_its_end: bool = True) -> Iterator[RawSample]:
        """Yield all samples of a shard. Where it cannot be read to its end, raises UserError, or ends if it need not
        be."""
        samples = self.head(shard, self._counts[shard])
        try:
            for _ in range(self._counts[shard]):
                raw = next(samples)
                if isinstance(raw, SampleFault):
                    if to_its_end:
                        raise UserError(str(raw))
                    return
                yield raw
        finally:
            samples.close()

    def decode(self, raw: RawSample) -> Sample:
        """Raises BadSample for a missing image or caption, or what is no image; pixels are decoded by the views."""
        shard, fields = raw.shard, raw.fields
        key = str(fields["__key__"]).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if PROBLEM in fields:
            raise BadSample(SampleFault("bad", shard, key, fields[PROBLEM]))
        data = image_of(fields)
        try:
            captions = captions_of(fields)
        except BadText as error:
            raise BadSample(SampleFault("bad", shard, key, str(error))) from None
        if data is None:
            raise BadSample(SampleFault("bad", shard, key, f"no image ({', '.join(IMAGE_EXTENSIONS)})"))
        if not captions:
            there = "txt" in fields or "json" in fields
            said = "no caption in its .txt or .json" if there else "no .txt or .json beside its picture in the tar"
            raise BadSample(SampleFault("bad", shard, key, said))
        which = wanted(captions, self._only)
        if not which:
            raise BadSample(SampleFault("filtered", shard, key, "no caption passes data.captions"))
        try:
            picture = Picture(data)
        except BadImage as error:
            raise BadSample(SampleFault("bad", shard, key, f"the image cannot be decoded: {error}")) from None
        return Sample(key, picture, captions, which, data, shard)

    def captions(self, limit: int) -> Iterator[str]:
        return islice(self._captions(), limit)

    def _captions(self) -> Iterator[str]:
        for shard in range(len(self.shards)):
            for raw in self.whole(shard, to_its_end=False):
                with suppress(BadText):
                    yield from captions_of(raw.fields)
