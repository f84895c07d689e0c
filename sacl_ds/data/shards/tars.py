"""Samples of a tar in their order, as webdataset groups them; and where in a local tar a sample begins.

Nothing is unpacked to a disk and no member is decoded by its name. What a header claims is held against limits before
memory is taken for it, and against the place where it stands: a tar may claim to go on before itself.
"""

from __future__ import annotations

import functools
import os
import re
import tarfile
import threading
from array import array
from collections.abc import Iterator
from typing import IO, Any

from webdataset.tariterators import base_plus_ext, group_by_keys

from sacl_ds.data.shards.layout import IMAGE_EXTENSIONS
from sacl_ds.data.shards.opening import Heart, Stream, open_shard, reason
from sacl_ds.data.shards.patterns import is_remote
from sacl_ds.errors import UserError

_BLOCK = 512  # bytes, of a tar's headers and padding
_FARTHEST = 1 << 62  # bytes into a file
_REGULAR = (b"0", b"\0", b"7")
_OTHERS = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, folders and the like: no files
_TIMES = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"}
_SKIPPED = r"__[^/]*__($|/)"  # what webdataset leaves out
_LARGEST_FILE = 1 << 28  # bytes; one that is larger counts as damaged
_CHUNK = 1 << 20  # bytes
_LARGEST_HEADER = 1 << 20  # bytes of names and times that do not fit a header
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class BadShard(OSError):
    """A tar that cannot be read on; the message says why."""


def samples_of(stream: Stream, without_image: bool = False) -> Iterator[dict[str, Any]]:
    """{'__key__': ..., 'jpg': bytes, ...} of each sample from where the stream stands. Raises BadShard.

    without_image: groups that have none too, which are no samples for training.
    """
    try:
        for fields in group_by_keys(_files(stream)):
            if without_image or image_of(fields) is not None:
                yield fields
    except Exception as error:  # tarfile, zlib and their kin raise a dozen types for damaged files
        raise _bad_shard(error) from None


class _Member(tarfile.TarInfo):
    """A header that claims nothing which reading it could not bear."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        """Raises BadShard."""
        made = super().frombuf(buf, encoding, errors)
        if made.size < 0 or made.type == tarfile.GNUTYPE_SPARSE:
            raise BadShard(f"a header in it says that {made.name[:80]!r} has {_claim(made)}")
        if made.type in _EXTENDED and made.size > _LARGEST_HEADER:
            raise BadShard(f"a header in it has {made.size} bytes of name")
        return made


def _claim(member: tarfile.TarInfo) -> str:
    return f"{member.size} bytes" if member.size < 0 else "holes"


def _files(stream: Stream) -> Iterator[dict[str, Any]]:
    """{'fname': ..., 'data': ...} of the regular files in their order, as webdataset's grouping takes them.

    Of one that is too large there are no bytes: its sample cannot be used, and the others keep their places.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar:  # type: ignore[call-overload]
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # which it would keep
            if member.size < 0 or member.issparse():  # said by an extended header
                raise BadShard(f"a header in it says that {member.name[:80]!r} has {_claim(member)}")
            large = member.size > _LARGEST_FILE
            if large:
                _pass_over(tar, member)
            if member.isreg() and not re.match(_SKIPPED, member.name):
                file = None if large else tar.extractfile(member)
                yield {"fname": member.name, "data": file.read() if file else b"", "__url__": ""}


def _pass_over(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Read to its end, or that of the tar: left to itself, tarfile would count its blocks for years."""
    if (file := tar.extractfile(member)) is None:
        raise BadShard(f"a header in it says that {member.name[:80]!r} has {member.size} bytes")
    while file.read(_CHUNK):
        continue


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
    keys, place = set(), -1
    try:
        with tarfile.open(shard, tarinfo=_Member) as tar:
            for member in tar:
                if member.offset <= place:
                    raise BadShard("its headers lead back to where they began")
                place = member.offset
                if member.isfile() and _extension(member.name) in IMAGE_EXTENSIONS:
                    keys.add(base_plus_ext(member.name)[0])
                tar.members = []  # type: ignore[attr-defined]
    except Exception as error:  # as in `samples_of`
        raise _bad_shard(error) from None
    return len(keys)


def _bad_shard(error: Exception) -> BadShard:
    if isinstance(error, OSError):
        return BadShard(reason(error))
    return BadShard(
        " ".join(str(next(iter(error.args), "")).split()) or type(error).__name__
    )  # webdataset adds arguments


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
            if kind == b"x" and _size(header) <= _LARGEST_HEADER:
                if not _only_times(os.pread(self._file, _size(header), place + _BLOCK)):
                    break
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
            following = place + _BLOCK + -(-size // _BLOCK) * _BLOCK
            if not place < following < _FARTHEST:
                return
            yield place, header
            place = following


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
