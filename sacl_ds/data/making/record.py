"""Record: a sample on its way into a shard; what can be wrong with it, and a survey of many."""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sacl_ds.data.captions import BadText, require_unicode
from sacl_ds.errors import UserError


class BrokenSample(Exception):
    """A sample that cannot be written. kind: a few words, the same for all of its sort; detail: which file, why."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True, slots=True)
class Record:
    """Sample to be written.

    load: gives the encoded image, or raises BrokenSample; runs only if the shard is made, on any thread. where: the
    file and row it comes from, for error lines. problem: what is wrong with that row, if anything.
    """

    key: str
    captions: Sequence[str]
    load: Callable[[], bytes]
    meta: Mapping[str, Any]
    where: str = ""
    problem: str = ""

    def checked_captions(self, drop_empty: bool) -> list[str]:
        """Return the captions without surrounding blanks, at least one.

        Raises BrokenSample where there is none, or an empty one that may not be dropped, or the row has a problem.
        """
        if self.problem:
            raise BrokenSample(self.problem)
        captions = [caption.strip() for caption in self.captions]
        said = [caption for caption in captions if caption]
        if not said:
            raise BrokenSample("no caption")
        if len(said) < len(captions) and not drop_empty:
            raise BrokenSample("empty caption", f"number {captions.index('') + 1} of {len(captions)}")
        try:
            return [require_unicode(caption) for caption in said]
        except BadText as error:
            raise BrokenSample(str(error)) from None

    def image_size(self) -> int:
        """Return the bytes of the encoded image, for a file without reading it. Raises BrokenSample."""
        return self.load.size() if isinstance(self.load, ImageFileLoader) else len(self.load())


@dataclass(frozen=True, slots=True)
class ImageFileLoader:
    """Loader of an image file."""

    path: str

    def __call__(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:
            raise self._broken(error) from None

    def size(self) -> int:
        try:
            status = os.stat(self.path)
        except (OSError, ValueError) as error:
            raise self._broken(error) from None
        if not stat.S_ISREG(status.st_mode):
            raise BrokenSample("image is no file", self.path)
        if not status.st_size:
            raise BrokenSample("image file is empty", self.path)
        return status.st_size

    def _broken(self, error: OSError | ValueError) -> BrokenSample:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return BrokenSample("image missing", self.path)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return BrokenSample("image unreadable", f"{self.path[:200]}: {reason}")


@dataclass(frozen=True, slots=True)
class ImageBytesLoader:
    """Loader of an image that the list itself holds."""

    data: bytes

    def __call__(self) -> bytes:
        return self.data


def no_image() -> bytes:
    """Raise BrokenSample as the `load` of a record without an image; the record's own problem says why."""
    raise BrokenSample("no image")


_TAR_BLOCK = 512
_LOOKED_AT = 16


@dataclass
class Survey:
    samples: int = 0  # records of the list, broken ones too
    tar_bytes: int = 0
    broken: Counter[str] = field(default_factory=Counter)  # by reason
    first: str = ""

    def require(self, skip_broken: bool) -> None:
        """Raises UserError, one line, for an empty list, for broken samples that may not be skipped, or if all are."""
        if not self.samples:
            raise UserError("there are no samples to write; see that the options name the right files")
        broken = sum(self.broken.values())
        if broken == self.samples or (broken and not skip_broken):
            advice = "or leave such samples out with --skip-broken" if broken < self.samples else "and the options"
            raise UserError(
                f"{broken} of {self.samples} samples cannot be written ({describe(self.broken)}), first {self.first}; "
                f"correct them {advice}"
            )


def survey(records: Iterable[Record], skip_broken: bool, seen: Callable[[int], None] = lambda count: None) -> Survey:
    """Check the captions of every record, and whether its image file is there: no image is read."""
    found = Survey()
    for record in records:
        found.samples += 1
        try:
            captions = record.checked_captions(drop_empty=skip_broken)
            found.tar_bytes += _tar_bytes(record.image_size(), captions)
        except BrokenSample as broken:
            found.broken[broken.kind] += 1
            found.first = found.first or f"{record.where or record.key}: {broken}"
        seen(1)
    return found


def sampled_survey(records: Collection[Record]) -> Survey:
    """Estimate the survey of a list that has no broken records from its first few."""
    part = survey(islice(records, _LOOKED_AT), skip_broken=False)
    share = len(records) / max(1, part.samples)
    return Survey(len(records), round(part.tar_bytes * share), part.broken, part.first)


def require_space(folder: Path, tar_bytes: int) -> None:
    """Raises UserError where the disk of `folder` cannot hold shards of so many bytes; those already there count."""
    there = sum(shard.stat().st_size for shard in folder.glob("*.tar"))
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if tar_bytes - there > free:
        raise UserError(
            f"{folder}: the shards need about {size(tar_bytes - there)} and {size(free)} are free; "
            "free some space or write to another disk"
        )


def describe(counts: Counter[str]) -> str:
    """Describe counts, most frequent first: '12 image missing, 3 no caption'."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def size(count: int) -> str:
    """Format bytes for people: '3.2 GB'."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _tar_bytes(image: int, captions: list[str]) -> int:
    """Return the bytes of a sample in a tar: three members, each a header and its content in whole blocks."""
    text = sum(len(caption.encode()) + 4 for caption in captions)
    meta = 150 + text + len(captions[0].encode())
    return sum(_TAR_BLOCK + -(-part // _TAR_BLOCK) * _TAR_BLOCK for part in (image, len(captions[0].encode()), meta))
