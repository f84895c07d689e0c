"""Reading ahead in a thread; a source that gives nothing and cannot be broken off is an error."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from queue import Empty, Full, Queue
from typing import Generic, Protocol, TypeVar

from sacl_ds.data.shards.opening import Heart
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
