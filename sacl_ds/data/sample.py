"""What a data source is: counted shards of samples that can be fetched by place and decoded one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from sacl_ds.data.order import Place


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its captions. image: PIL, RGB. image_bytes: what identifies the image, for duplicate ids."""

    key: str
    image: Image.Image
    captions: list[str]
    image_bytes: bytes


class Reader(Protocol):
    """One stream's access to a source; keeps its place between calls, so reading on costs nothing."""

    def fetch(self, places: Sequence[Place], wanted: Sequence[bool]) -> list[Any]:
        """Undecoded samples at `places`, which lie front to back; None where not wanted."""


class Source(Protocol):
    """Counted shards of samples."""

    counts: list[int]

    def reader(self) -> Reader: ...

    def decode(self, raw: Any) -> Sample: ...

    def captions(self, limit: int) -> Iterator[str]:
        """Captions of the first samples, at most `limit`: what a vocabulary is trained on."""

    def iterate(self, limit: int | None, rank: int, world: int) -> Iterator[Sample]:
        """Every world-th of the first `limit` samples in their stored order, from number `rank` on."""
