"""Batches on the device, the next one's copy under way while the current one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Protocol, TypeVar

import torch

Moved = TypeVar("Moved", bound="Moves")


class Moves(Protocol):
    """What can be copied to a GPU beside its work, as `Movable` can."""

    def to(self: Moved, device: torch.device) -> Moved:
        """Without waiting, where the memory is page-locked."""

    def pin_memory(self: Moved) -> Moved: ...

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Its memory is not given away before what `stream` holds by then is done."""


def ahead(batches: Iterable[Moved], device: torch.device) -> Iterator[Moved]:
    """The batches in order, on `device`. What `batches` raises is raised in its place, behind the batches before it.

    On CUDA one batch more than was asked for is taken from `batches`, and copied on a stream of its own; a batch is to
    be used on the stream that is current where it is asked for. Elsewhere nothing is taken or copied ahead.
    """
    if device.type == "cuda":
        return _copied_ahead(iter(batches), device)
    return (batch.to(device) for batch in batches)


def _copied_ahead(batches: Iterator[Moved], device: torch.device) -> Iterator[Moved]:
    copies = _stream(device)
    coming = _start(batches, device, copies)
    while coming is not None:
        # the copy is waited for before the one after it begins: on one stream it would have to end as well
        used = torch.cuda.current_stream(device)
        used.wait_stream(copies)
        coming.record_stream(used)
        batch, failure = coming, None
        try:
            coming = _start(batches, device, copies)
        except Exception as error:  # whatever it is, it belongs behind the batch at hand
            failure = error
        yield batch
        del batch  # or its memory would be held while the batch after the next is copied
        if failure is not None:
            raise failure


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all copies to a device: the allocator keeps memory that was freed for the stream it was taken on."""
    return torch.cuda.Stream(device)


def _start(batches: Iterator[Moved], device: torch.device, copies: torch.cuda.Stream) -> Moved | None:
    """The next batch, its copy begun; None at the end."""
    batch = next(batches, None)
    if batch is None:
        return None
    pinned = batch.pin_memory()
    with torch.cuda.stream(copies):
        return pinned.to(device)
