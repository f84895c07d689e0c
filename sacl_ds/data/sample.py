"""Interface of a data source: counted shards of samples that are read by place and decoded one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sacl_ds.data.order import Block
from sacl_ds.data.pictures import Picture
from sacl_ds.errors import one_line


@dataclass(frozen=True, slots=True)
class SampleFault:
    """Reason why a sample was replaced.

    kind: `bad` cannot be used, `filtered` was not wanted. key: '' where the shard could not be read so far. shard: ''
    for an example of a list, whose key says what it is.
    """

    kind: Literal["bad", "filtered"]
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        where = f"shard {self.shard}{', sample ' + self.key if self.key else ''}" if self.shard else self.key
        return one_line(f"{where}: {self.reason}")


class BadSample(ValueError):
    """Raised where a sample cannot be used."""

    def __init__(self, fault: SampleFault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Sample:
    """Image with its captions.

    image_bytes: what identifies the image, for duplicate ids. wanted: which of the captions may be drawn; all but those
    that a filter leaves out.
    """

    key: str
    picture: Picture
    captions: list[str]
    wanted: list[int]
    image_bytes: bytes
    shard: str = ""

    @property
    def fingerprint(self) -> int:
        """64-bit hash of key, image and captions."""
        digest = hashlib.blake2b(self.image_bytes, digest_size=8)
        digest.update("\0".join([self.key, *self.captions]).encode())
        return int.from_bytes(digest.digest(), "little")

    def fault(self, reason: str) -> SampleFault:
        return SampleFault("bad", self.shard, self.key, reason)


class Samples(Protocol):
    """Iterator over undecoded samples that can be closed."""

    def __next__(self) -> Any | SampleFault: ...

    def close(self) -> None: ...


class Numbers:
    """Samples that are made from their numbers alone."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = iter(numbers)

    def __next__(self) -> int:
        return next(self._numbers)

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class Source(Protocol):
    """Counted shards of samples, in one or several sets; shards are numbered through all sets."""

    @property
    def sets(self) -> Sequence[Sequence[int]]:
        """Samples per shard, for each set."""

    @property
    def weights(self) -> Sequence[float] | None:
        """Share of each set in a batch; None for one set."""

    def read(self, blocks: Iterator[Block]) -> Samples:
        """Yield the undecoded samples at the blocks' places; a Fault in place of each that cannot be read."""

    def head(self, shard: int, count: int) -> Samples:
        """Yield the first samples of a shard, `count` at most."""

    def decode(self, raw: Any) -> Sample:
        """Raises BadSample."""

    def captions(self, limit: int) -> Iterator[str]:
        """Yield captions of the first samples, at most `limit`, on which a vocabulary is trained."""
