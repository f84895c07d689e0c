"""Record: a sample on its way into a shard, and what can be wrong with it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sacl_ds.data.captions import BadText, require_unicode


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
