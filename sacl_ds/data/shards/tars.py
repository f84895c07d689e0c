"""Samples of a tar in their order, grouped as webdataset does; and the offset of each sample in a local tar.

A sample is what neighbours of one key hold, which is their names up to the first dot. One whose picture cannot be used
(a link, a name twice, another format, another dot in its name) is a sample with a problem: it keeps its place, and is
counted and named like any other that is bad.

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
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Generic, TypeVar

from webdataset.tariterators import base_plus_ext

from sacl_ds.data.shards.opening import Heart, Stream, open_shard, reason
from sacl_ds.data.shards.patterns import IMAGE_EXTENSIONS, is_remote
from sacl_ds.errors import UserError

_BLOCK = 512  # bytes, of a tar's headers and padding
_FARTHEST = 1 << 62  # bytes into a file
_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_OTHERS = (*_LINKS, b"3", b"4", b"5", b"6")  # folders and the like: nothing follows their headers
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


_FIELDS = (*IMAGE_EXTENSIONS, "txt", "json")  # that are read
_OTHER_PICTURES = ("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jxl", "svg", "tif", "tiff")
PROBLEM = "__problem__"

Item = TypeVar("Item")


class BadShard(OSError):
    """Raised for a tar that cannot be read on; the message says why."""


@dataclass
class _Group(Generic[Item]):
    """Consecutive members of one key.

    fields: those that are read, by extension. dotted: names of pictures with another dot in them. others: extensions of
    pictures in other formats.
    """

    key: str
    first: Item
    fields: dict[str, Item] = field(default_factory=dict)
    dotted: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    problem: str = ""

    def add(self, extension: str, link: bool, item: Item) -> None:
        inner, _, last = extension.rpartition(".")
        kind = last.lower()
        if inner:
            if kind in (*IMAGE_EXTENSIONS, *_OTHER_PICTURES):
                self.dotted.append(f"{self.key}.{inner}")
        elif kind in _OTHER_PICTURES:
            self.others.append(kind)
        elif kind in _FIELDS:
            if kind in self.fields:
                self.problem = self.problem or f"two files .{kind} of its key in the tar"
            elif link:
                self.problem = self.problem or (
                    f"its .{kind} is a link in the tar; write that with tar --dereference --hard-dereference"
                )
            self.fields[kind] = item

    def samples(self) -> list[tuple[str, str]]:
        """List (key, problem or "") of each sample that has a picture."""
        if not self.fields.keys().isdisjoint(IMAGE_EXTENSIONS):
            return [(self.key, self.problem)]
        if self.others:
            return [(self.key, f"its picture is .{self.others[0]}; shards hold {', '.join(IMAGE_EXTENSIONS)}")]
        return [(key, "a key ends at the first dot of a name; name its files without another") for key in self.dotted]


def _grouped(members: Iterable[tuple[str, bool, Item]]) -> Iterator[_Group[Item]]:
    """Group consecutive members by key, without hidden files and what webdataset leaves out.

    members: (name, whether it is a link, anything) of files and links.
    """
    group: _Group[Item] | None = None
    for name, link, item in members:
        key, extension = base_plus_ext(name)
        if key is None or name.rpartition("/")[2].startswith(".") or re.match(_SKIPPED, name):
            continue
        if group is None or key != group.key:
            if group is not None:
                yield group
            group = _Group(key, item)
        group.add(extension, link, item)
    if group is not None:
        yield group


def samples_of(stream: Stream, without_image: bool = False) -> Iterator[dict[str, Any]]:
    """Yield {'__key__': ..., 'jpg': bytes, ...} of each sample from where the stream stands.

    Only pictures, txt and json are read; of one that cannot be used, PROBLEM says why. Raises BadShard.

    without_image: groups that have none too, which are no samples for training.
    """
    try:
        for group in _grouped(_files(stream)):
            samples = group.samples()
            for key, problem in samples:
                yield {
                    "__key__": key,
                    **(group.fields if key == group.key else {}),
                    **({PROBLEM: problem} if problem else {}),
                }
            if without_image and not samples:
                yield {"__key__": group.key, **group.fields}
    except Exception as error:  # tarfile, zlib and their kin raise a dozen types for damaged files
        raise _bad_shard(error) from None


class _Member(tarfile.TarInfo):
    """Tar header that refuses claims which reading could not bear."""

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


def _files(stream: Stream) -> Iterator[tuple[str, bool, bytes]]:
    """Yield (name, whether it is a link, bytes) of the regular files and links in their order.

    A file that is too large has no bytes: its sample cannot be used, and the others keep their places.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar:  # type: ignore[call-overload]
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # which it would keep
            link = member.islnk() or member.issym()
            if member.size < 0 or member.issparse():  # said by an extended header
                raise BadShard(f"a header in it says that {member.name[:80]!r} has {_claim(member)}")
            large = member.size > _LARGEST_FILE and not link
            if large:
                _pass_over(tar, member)
            if link or member.isreg():
                read = not (large or link) and _extension(member.name) in _FIELDS
                file = tar.extractfile(member) if read else None
                yield member.name, link, file.read() if file else b""


def _pass_over(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Read a member to its end, or that of the tar: tarfile would count a false size's blocks for years."""
    if (file := tar.extractfile(member)) is None:
        raise BadShard(f"a header in it says that {member.name[:80]!r} has {member.size} bytes")
    while file.read(_CHUNK):
        continue


def read_samples(shard: str, without_image: bool = False) -> Iterator[dict[str, Any]]:
    """Yield `samples_of` a whole shard. Raises UserError, naming it, where it cannot be read."""
    try:
        with open_shard(shard) as stream:
            yield from samples_of(stream, without_image)
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read: {reason(error)}") from None


def image_of(fields: dict[str, Any]) -> bytes | None:
    return next((fields[extension] for extension in IMAGE_EXTENSIONS if extension in fields), None)


def count_in(shard: str) -> int:
    """Count the samples with an image, by the headers; of a remote shard everything is read. Raises BadShard,
    UserError."""
    if is_remote(shard):
        with open_shard(shard) as stream:
            return sum(1 for _ in samples_of(stream))
    try:
        with tarfile.open(shard, tarinfo=_Member) as tar:
            return sum(len(group.samples()) for group in _grouped(_names(tar)))
    except Exception as error:  # as in `samples_of`
        raise _bad_shard(error) from None


def _names(tar: tarfile.TarFile) -> Iterator[tuple[str, bool, None]]:
    place = -1
    for member in tar:
        if member.offset <= place:
            raise BadShard("its headers lead back to where they began")
        place = member.offset
        link = member.islnk() or member.issym()
        if link or member.isreg():
            yield member.name, link, None
        tar.members = []  # type: ignore[attr-defined]


def _bad_shard(error: Exception) -> BadShard:
    if isinstance(error, OSError):
        return BadShard(reason(error))
    return BadShard(" ".join(str(error).split()) or type(error).__name__)


def start_of(file: IO[bytes], number: int, heart: Heart) -> tuple[int, int]:
    """(byte, sample): a header from which reading reaches sample `number` of a local tar, and which sample it begins.

    Goes from header to header without reading what lies between, and remembers what it has seen of that file. Where a
    tar is such that reading it from its front may stop or say something else, the answer is its front: damaged headers,
    names that need more than their own headers.
    """
    status = os.fstat(file.fileno())
    starts = _starts(os.getpid(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return starts.of(file, number, heart)


class _Starts:
    """Lazy index of the offsets at which a tar's samples begin."""

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
            begin = self._found[number]
            return begin, bisect_left(self._found, begin)

    def _walk(self) -> Iterator[int]:
        """Yield the offset of the header at which each sample's group begins."""
        try:
            for group in _grouped(self._members()):
                for _ in group.samples():
                    yield group.first
        except BadShard:
            return

    def _members(self) -> Iterator[tuple[str, bool, int]]:
        """Yield (name, whether it is a link, offset of its headers) of files and links. Raises BadShard at a header
        that may mean more than it says."""
        extended: int | None = None  # where the header begins that belongs to the next one
        for place, header in self._headers():
            self._heart.beat()
            kind = header[156:157]
            if kind == b"x" and _size(header) <= _LARGEST_HEADER:
                if not _only_times(os.pread(self._file, _size(header), place + _BLOCK)):
                    raise BadShard("an extended header")
                extended = place
                continue
            if kind not in _REGULAR and kind not in _OTHERS:
                raise BadShard("a header of another kind")
            if kind in _REGULAR or kind in _LINKS:
                yield _name(header), kind in _LINKS, place if extended is None else extended
            extended = None

    def _headers(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, header) of each member of an uncompressed tar, up to its end or to what is no header."""
        place = 0
        while True:
            header = os.pread(self._file, _BLOCK, place)
            if len(header) < _BLOCK or header[257:262] != b"ustar":
                return
            try:
                if int(header[148:156].strip(b" \0") or b"0", 8) != sum(header) - sum(header[148:156]) + 8 * 32:
                    return
                size = 0 if header[156:157] in _OTHERS else _size(header)
            except ValueError:
                return
            following = place + _BLOCK + -(-size // _BLOCK) * _BLOCK
            if not place < following < _FARTHEST:
                return
            yield place, header
            place = following


@functools.lru_cache(maxsize=128)
def _starts(*_: int) -> _Starts:
    """Index of the file with this device, inode, size and time of change, shared within the process.

    The process id is part of the key: a fork must not wait for its parent's locks.
    """
    return _Starts()


def _only_times(records: bytes) -> bool:
    """Return whether an extended header of lines 'length key=value' leaves the next one's name and size as they are."""
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
