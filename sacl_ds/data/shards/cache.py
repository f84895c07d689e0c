"""Cache of remote shards on a local disk, up to a size; safe for any number of processes and for being killed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from sacl_ds.data.shards.opening import STALL_SECONDS, Heart, Stream, open_shard
from sacl_ds.errors import UserError

_CHUNK = 1 << 20
_ROOM_EVERY = 32  # chunks
_POLL_SECONDS = 0.1
_PARTIAL, _LOCK = ".partial", ".lock"
_OWN = re.compile(r"[0-9a-f]{16}-.*", re.DOTALL)  # names that the cache gives: nothing else is removed
_ABANDONED_SECONDS = 3600.0  # a fetch that was killed leaves its part


@dataclass(frozen=True)
class ShardCache:
    """Cache of whole shards under `folder`, about `limit` bytes; the least recently used go first.

    A shard that is being read may be removed: its reader keeps the open file. One that changes at its address is not
    noticed.
    """

    folder: Path
    limit: int

    @classmethod
    def of(cls, folder: str | None, gigabytes: float) -> ShardCache | None:
        """Create the cache of data.cache_dir and data.cache_gb. Raises UserError for a folder that is not writable."""
        if folder is None:
            return None
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / _LOCK).touch()
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"data.cache_dir={folder} cannot be written to: {reason}") from None
        return cls(path, int(gigabytes * 1e9))

    def open(self, shard: str, heart: Heart, stall_seconds: float = STALL_SECONDS) -> Stream:
        """Open the shard, fetched first if need be, by one process at a time; from its address if there is no room for
        it. Raises OSError where it cannot be fetched."""
        path = self._path(shard)
        while True:
            with contextlib.suppress(OSError):
                stream = Stream(path.open("rb"), heart, stall_seconds)
                with contextlib.suppress(OSError):
                    os.utime(path)  # used now
                return stream
            if not self.fetch(shard, heart, stall_seconds):
                return open_shard(shard, heart, stall_seconds)

    def forget(self, shard: str) -> None:
        """Remove the shard, so that it is fetched anew."""
        with contextlib.suppress(OSError):
            self._path(shard).unlink()

    def fetch(self, shard: str, heart: Heart, stall_seconds: float = STALL_SECONDS) -> bool:
        """Fetch the shard if it is not here; False where this disk or the limit has no room for it. Raises OSError for
        its source."""
        path = self._path(shard)
        partial = path.with_name(path.name + _PARTIAL)
        try:
            lock = path.with_name(path.name + _LOCK).open("a")
        except OSError:
            return False
        with lock:
            _lock(lock, heart, partial)
            if path.exists():
                return True
            with open_shard(shard, heart, stall_seconds) as stream:
                return self._keep(stream, partial, path)

    def _keep(self, stream: Stream, partial: Path, path: Path) -> bool:
        chunks = 0
        try:
            file = partial.open("wb")
        except OSError:
            return False
        try:
            with file:
                while data := stream.read(_CHUNK):
                    if chunks % _ROOM_EVERY == 0 and not self._make_room():
                        return False
                    if not _written(file, data):
                        return False
                    chunks += 1
            if not self._make_room():
                return False
            with contextlib.suppress(OSError):
                partial.replace(path)
            return path.exists()
        finally:
            partial.unlink(missing_ok=True)

    def prefetch(self, shard: str, stall_seconds: float = STALL_SECONDS) -> None:
        """Fetch in the background; errors show when the shard is opened."""

        def work() -> None:
            with contextlib.suppress(Exception):
                self.fetch(shard, Heart(), stall_seconds)

        threading.Thread(target=work, daemon=True).start()

    def _path(self, shard: str) -> Path:
        name = PurePosixPath(shard.partition("?")[0]).name[-80:]
        return self.folder / f"{hashlib.sha256(shard.encode()).hexdigest()[:16]}-{name}"

    def _make_room(self) -> bool:
        """Remove whole shards until the limit holds; False where what is being fetched exceeds it alone."""
        with (self.folder / _LOCK).open("a") as lock:
            _lock(lock, Heart())
            found: list[tuple[float, int, Path]] = []
            for path in self.folder.iterdir():
                if not _OWN.fullmatch(path.name):
                    continue  # the folder may be anybody's
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    found.append((status.st_mtime, status.st_size, path))
            most = self.limit - _ROOM_EVERY * _CHUNK
            total = sum(size for _, size, _ in found)
            for used, size, path in sorted(found):
                if total <= most:
                    break
                left_behind = path.name.endswith(_PARTIAL) and time.time() - used > _ABANDONED_SECONDS
                if left_behind or not path.name.endswith((_PARTIAL, _LOCK)):
                    path.unlink(missing_ok=True)
                    total -= size
            return total <= most


def _written(file: IO[bytes], data: bytes) -> bool:
    try:
        file.write(data)
        file.flush()
    except OSError:  # the disk is full, or a quota is
        return False
    return True


def _lock(file: IO[str], heart: Heart, growing: Path | None = None) -> None:
    """Lock the file until it is closed; the kernel releases it when the process ends.

    Waiting counts as a beat of `heart` while the file `growing` grows.
    """
    size = -1
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            with contextlib.suppress(FileNotFoundError):
                if growing and growing.stat().st_size != size:
                    size = growing.stat().st_size
                    heart.beat()
            time.sleep(_POLL_SECONDS)
