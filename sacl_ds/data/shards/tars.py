"""Samples of a tar in their order, as webdataset groups them; and where in a local tar a sample begins."""

from __future__ import annotations

import functools
import os
import re
import tarfile
import threading
from array import array
from collections.abc import Iterator
from typing import IO, Any

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from sacl_ds.data.shards.layout import IMAGE_EXTENSIONS
from sacl_ds.data.shards.opening import Heart, Stream, open_shard, reason
from sacl_ds.data.shards.patterns import is_remote
from sacl_ds.errors import UserError

_BLOCK = 512  # bytes, of a tar's headers and padding
_REGULAR = (b"0", b"\0", b"7")
_OTHERS = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, folders and the like: no files
_TIMES = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"}
_SKIPPED = r"__[^/]*__($|/)"  # what webdataset leaves out


class BadShard(OSError):
    """A tar that cannot be read on; the message says why."""


def samples_of(stream: Stream, without_image: bool = False) -> Iterator[dict[str, Any]]:
    """{'__key__': ..., 'jpg': bytes, ...} of each sample from where the stream stands. Raises BadShard.

    without_image: groups that have none too, which are no samples for training.
    """
    try:
        for fields in group_by_keys(tar_file_expander([{"url": "", "stream": stream}])):
            if without_image or image_of(fields) is not None:
                yield fields
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        # webdataset adds the stream to the message and to the arguments
        said = (error.strerror if isinstance(error, OSError) else None) or str(next(iter(error.args), error))
        raise BadShard(said.partition(" @ <")[0]) from None


def read_samples(shard: str, without_image: bool = False) -> Iterator[dict[str, Any]]:
    """`samples_of` a whole shard. Raises UserError, naming it, where it cannot be read."""
    try:
        with open_shard(shard) as stream:
            yield from samples_of(stream, without_image)
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read: {reason(error)}") from None


def image_of(fields: dict[str, Any]) -> bytes | None:
    return next((fields[extension] for extension in IMAGE_EXTENSIONS if extension in fields), None)


def count_in(shard: str) -> int:
    """Samples with an image, by the headers; of a remote shard everything is read. Raises BadShard, UserError."""
    if is_remote(shard):
        with open_shard(shard) as stream:
            return sum(1 for _ in samples_of(stream))
    try:
        with tarfile.open(shard) as tar:
            return len({base_plus_ext(m.name)[0] for m in tar if m.isfile() and _extension(m.name) in IMAGE_EXTENSIONS})
    except (OSError, tarfile.TarError) as error:
        raise BadShard(reason(error)) from None


def start_of(file: IO[bytes], number: int, heart: Heart) -> tuple[int, int]:
    """(byte, sample): a header from which reading reaches sample `number` of a local tar, and which sample it begins.

    Goes from header to header without reading what lies between, and remembers what it has seen of that file. Where a
    tar is such that reading it from its front may stop or say something else, the answer is its front: damaged headers,
    a name twice, names that need more than their own headers.
    """
    status = os.fstat(file.fileno())
    starts = _starts(os.getpid(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return starts.of(file, number, heart)


class _Starts:
    """Where the samples of one tar begin, found as far as was asked for."""

    def __init__(self) -> None:
        self._found = array("q")
        self._lock = threading.Lock()
        self._scan = self._walk()
        self._file: int
        self._heart: Heart

    def of(self, file: IO[bytes], number: int, heart: Heart) -> tuple[int, int]:
        with self._lock:
            self._file, self._heart = file.fileno(), heart
            while len(self._found) <= number:
                begin = next(self._scan, None)
                if begin is None:
                    return 0, 0
                self._found.append(begin)
            return self._found[number], number

    def _walk(self) -> Iterator[int]:
        """The header that each sample begins with; a group without an image belongs to the sample that follows."""
        group, extensions = "", set(IMAGE_EXTENSIONS)
        extended: int | None = None  # where the header begins that belongs to the next one
        for place, header in self._headers():
            self._heart.beat()
            kind = header[156:157]
            if kind == b"x" and _only_times(os.pread(self._file, _size(header), place + _BLOCK)):
                extended = place
                continue
            if kind not in _REGULAR:
                if kind in _OTHERS:
                    continue
                break
            start, extended = place if extended is None else extended, None
            name = _name(header)
            key, extension = base_plus_ext(name)
            if key is None or re.match(_SKIPPED, name):
                continue
            if key != group:
                if not extensions.isdisjoint(IMAGE_EXTENSIONS):
                    yield start
                group, extensions = key, set()
            extension = (extension or "").lower()
            if extension in extensions:
                break
            extensions.add(extension)

    def _headers(self) -> Iterator[tuple[int, bytes]]:
        """(byte, header) of each member of a tar that is not compressed, up to its end or to what is no header."""
        place = 0
        while True:
            header = os.pread(self._file, _BLOCK, place)
            if len(header) < _BLOCK or header[257:262] != b"ustar":
                return
            try:
                if int(header[148:156].strip(b" \0") or b"0", 8) != sum(header) - sum(header[148:156]) + 8 * 32:
                    return
                size = _size(header)
            except ValueError:
                return
            yield place, header
            place += _BLOCK + -(-size // _BLOCK) * _BLOCK


@functools.lru_cache(maxsize=128)
def _starts(*_: int) -> _Starts:
    """Of this process (a fork must not wait for its parent's locks) and the file with this device, inode, size, time
    of change."""
    return _Starts()


def _only_times(records: bytes) -> bool:
    """Whether an extended header of lines 'length key=value' changes nothing about the next one's name and size."""
    keys = set()
    while records.strip(b"\0"):
        length, _, rest = records.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(records):
            return False
        keys.add(rest.partition(b"=")[0])
        records = records[int(length) :]
    return keys <= _TIMES


def _name(header: bytes) -> str:
    name, prefix = (part.split(b"\0", 1)[0] for part in (header[:100], header[345:500]))
    whole = prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name  # GNU: other things there
    return whole.decode("utf-8", "surrogateescape")


def _size(header: bytes) -> int:
    digits = header[124:136]
    if digits[0] & 0x80:  # base 256, for what octal cannot say
        return int.from_bytes(digits[1:], "big")
    return int(digits.strip(b" \0") or b"0", 8)


def _extension(name: str) -> str:
    return (base_plus_ext(name)[1] or "").lower()
