"""Opening of shards wherever they lie: a file, http(s) through curl, what webdataset opens, what fsspec opens.

All come as a `Stream`. One that is a process's output is broken off, by a thread that watches all, where a read waits
for longer than its limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
from webdataset.gopen import Pipe, gopen, gopen_schemes

from sacl_ds.errors import UserError

STALL_SECONDS = 60.0
_CONNECT_SECONDS = 30
_CHUNK = 1 << 16
_BUFFER = 1 << 19  # bytes of a local shard read together: fewer waits for the interpreter's lock than many small reads


class Heart:
    """Watchdog of a reader: when it last moved, on a monotonic clock in seconds, and a way to end it."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.stopped = False
        self._stream: Stream | None = None

    def beat(self) -> None:
        self.last = time.monotonic()

    @property
    def still_for(self) -> float:
        return time.monotonic() - self.last

    def reads_from(self, stream: Stream) -> None:
        self._stream = stream
        if self.stopped:
            stream.break_off()

    def stop(self) -> None:
        """Break off, from another thread, the stream that is read from now or later, where that is possible."""
        self.stopped = True
        if self._stream is not None:
            self._stream.break_off()


class Stream:
    """Stream of bytes, read from front to back."""

    def __init__(self, source: IO[bytes] | Pipe, heart: Heart, stall_seconds: float, owner: object = None) -> None:
        """Wrap a source. heart: beats when bytes have come. owner: what must live as long as the source."""
        self._source, self._heart, self._owner = source, heart, owner
        self._limit, self._since, self._ended = stall_seconds, 0.0, False
        self.stalled = False
        self.file = source if isinstance(source, io.BufferedReader) else None  # a local one, which can be sought in
        if isinstance(source, Pipe):
            _watch(self)
        heart.reads_from(self)

    def read(self, size: int = -1) -> bytes:
        """Raises OSError where the source fails or is broken off, with the reason; b'' at its end."""
        try:
            if isinstance(self._source, Pipe):
                return self._read_pipe(self._source, size)
            data: bytes = self._source.read(size)
        except Exception as error:  # protocols of fsspec have exceptions of their own
            raise OSError(reason(error)) from None
        self._heart.beat()
        return data

    def _read_pipe(self, pipe: Pipe, size: int) -> bytes:
        """Read like a file. The pipe's own read raises when its command has failed, and drops what that gave before."""
        parts: list[bytes] = []
        left = size
        while left:
            self._since = time.monotonic()
            part = pipe.stream.read1(_CHUNK if left < 0 else min(left, _CHUNK))
            self._since = 0.0
            if not part:
                break
            self._heart.beat()
            parts.append(part)
            left -= len(part) if left > 0 else 0
        if left and not parts:
            self._ended = True
            if self.stalled:
                raise OSError(f"it gave nothing for {self._limit:g} s")
            status = pipe.proc.wait()
            if status not in pipe.ignore_status:  # a transfer that broke off ends like one that is whole, but for this
                raise OSError(_said(pipe) or f"its command ended with status {status}")
        return b"".join(parts)

    def break_off(self) -> bool:
        """End a blocked read from another thread. Returns whether that is possible."""
        if not isinstance(self._source, Pipe):
            return False
        self.stalled = True
        _end(self._source)
        return True

    @property
    def waits_too_long(self) -> bool:
        since = self._since
        return bool(since) and time.monotonic() - since > self._limit

    def close(self) -> None:
        """Close without waiting for the rest and without raising."""
        if isinstance(self._source, Pipe):
            if not self._ended:
                _end(self._source)
            self._source.ignore_errors = True
            if self._source.proc.stderr:
                self._source.proc.stderr.close()
        with contextlib.suppress(Exception):
            self._source.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_shard(shard: str, heart: Heart | None = None, stall_seconds: float = STALL_SECONDS) -> Stream:
    """Raises OSError where it cannot be opened, UserError where no opener for it is installed."""
    heart = heart or Heart()
    scheme = "pipe" if shard.startswith("pipe:") else shard.partition("://")[0] if "://" in shard else "file"
    if scheme == "file":
        return Stream(open(shard.removeprefix("file://"), "rb", _BUFFER), heart, stall_seconds)
    if scheme in ("http", "https"):
        # webdataset's own line for curl tries a failing server thirty times and waits for a silent one for ever
        if shutil.which("curl") is None:
            raise UserError(f"shard {shard}: curl is not installed, which fetches it; install it or use a local path")
        line = ["curl", "-f", "-s", "-S", "-N", "-L", "--connect-timeout", str(_CONNECT_SECONDS), shard]
        return Stream(_pipe(line, stderr=subprocess.PIPE), heart, stall_seconds)
    if scheme == "pipe":
        return Stream(_pipe(shard.removeprefix("pipe:"), shell=True), heart, stall_seconds)
    if scheme in gopen_schemes:
        try:
            return Stream(gopen(shard), heart, stall_seconds)
        except FileNotFoundError as error:
            raise UserError(f"shard {shard}: {error.filename} is not installed, which fetches it") from None
        except Exception as error:  # of the hub's library
            raise OSError(reason(error)) from None
    try:
        opened: Any = fsspec.open(shard, "rb")
    except (ImportError, ValueError) as error:  # no package for that protocol; no such protocol
        raise UserError(f"shard {shard} cannot be opened: {reason(error)}") from None
    try:
        return Stream(opened.open(), heart, stall_seconds, opened)
    except Exception as error:  # as in `read`
        raise error if isinstance(error, OSError) else OSError(reason(error)) from None


def reason(error: Exception) -> str:
    """Return why something could not be read, without line breaks."""
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(said.split())


def _pipe(command: str | list[str], **more: Any) -> Pipe:
    """Start a command in a process group of its own, so that all of a shell's line can be ended."""
    return Pipe(command, mode="rb", ignore_status=[23, 141], start_new_session=True, **more)


def _end(pipe: Pipe) -> None:
    try:
        if os.getpgid(pipe.proc.pid) == pipe.proc.pid:
            os.killpg(pipe.proc.pid, signal.SIGKILL)
        else:
            pipe.proc.kill()
    except OSError:  # it has ended
        return


def _said(pipe: Pipe) -> str:
    """Return what the failed command has written to stderr."""
    said = pipe.proc.stderr.read().decode("utf-8", "replace") if pipe.proc.stderr else ""
    return " ".join(said.split())


class _Watchdog:
    """Thread that breaks off streams that wait too long.

    There is one a process: a forked one has none, so it starts its own.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.lock = threading.Lock()
        self.shortest = STALL_SECONDS
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, stream: Stream, limit: float) -> None:
        with self.lock:
            self.streams.add(stream)
            self.shortest = min(self.shortest, limit)

    def _run(self) -> None:
        while True:
            time.sleep(min(1.0, self.shortest / 4))
            with self.lock:
                waiting = [stream for stream in self.streams if stream.waits_too_long and not stream.stalled]
            for stream in waiting:
                stream.break_off()


_watchdog: _Watchdog | None = None
_starting = threading.Lock()


def _watch(stream: Stream) -> None:
    global _watchdog  # noqa: PLW0603
    with _starting:
        if _watchdog is None or _watchdog.process != os.getpid():
            _watchdog = _Watchdog()
    _watchdog.add(stream, stream._limit)


_DOWNLOADED_AT_ONCE = 1 << 20
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
                while data := stream.read(_DOWNLOADED_AT_ONCE):
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
            most = self.limit - _ROOM_EVERY * _DOWNLOADED_AT_ONCE
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
