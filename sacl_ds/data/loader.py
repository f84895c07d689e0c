"""Data loader: one rank's part of every global batch, made by worker processes.

A worker owns some of the rank's slots and makes them for every step; the main process joins the workers' pieces. So
which samples a global batch holds depends on `GlobalOrder` alone, with any number of ranks and workers.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sacl_ds.data.batch import Moves
from sacl_ds.data.faults import SampleFault
from sacl_ds.data.feed import Feed
from sacl_ds.data.order import GlobalOrder, Place
from sacl_ds.data.sample import Source
from sacl_ds.errors import UserError

_GRACE = 25.0  # seconds that a loader works on when asked to end
_PREFETCHED = 4  # pieces a worker makes ahead
# A loader ends when its parent does, and that must be the rank: a server that forks for it (the default of Python 3.14)
# outlives a rank that was killed, and the loader with it.
_START = "fork" if sys.platform.startswith("linux") else None

Made = TypeVar("Made", bound="Loadable")


class Loadable(Moves, Protocol):
    """A batch as the loader makes it and the training loop takes it: tensors whose first dimension are its rows."""

    @property
    def pair_ids(self) -> Tensor:
        """(b, k) int64: ids of the rows, the same in every run."""

    @property
    def faults(self) -> list[SampleFault]:
        """Samples that others of this batch stand in for."""

    def __len__(self) -> int: ...

    def parts(self: Made, rows: int) -> list[Made]:
        """Split the rows in order into micro-batches of `rows`, texts cut to each one's longest."""


class Collates(Protocol[Made]):
    """Interface of collators: decode one sample at a time, then join a piece's items into a batch."""

    def item(self, sample: Any, place: Place) -> Any:
        """Decode and transform a sample to an item. Raises BadSample."""

    def __call__(self, items: Sequence[Any], faults: Sequence[SampleFault] = ()) -> Made: ...

    def join(self, parts: Sequence[Made]) -> Made:
        """Concatenate batches, in order."""


class BatchLoader(Generic[Made]):
    """Iterator over this rank's batches from `start_step` on, for ever."""

    def __init__(
        self,
        source: Source,
        order: GlobalOrder,
        collator: Collates[Made],
        *,
        rank: int,
        world: int,
        workers: int,
        start_step: int = 0,
        pin_memory: bool = False,
    ) -> None:
        per_rank = order.batch // world
        if per_rank * world != order.batch:
            raise ValueError(f"{order.batch} slots do not divide over {world} ranks")
        self.collator, self.pin_memory = collator, pin_memory
        self.pieces = max(1, min(workers, per_rank))
        self._loader: DataLoader[Any] = DataLoader(
            _Pieces(source, order, collator, rank * per_rank, per_rank, start_step),
            batch_size=None,
            num_workers=self.pieces if workers else 0,
            prefetch_factor=_PREFETCHED if workers else None,
            persistent_workers=bool(workers),
            multiprocessing_context=_START if workers else None,
        )

    def __iter__(self) -> Iterator[Made]:
        # DataLoader takes one item from each worker in turn, so `pieces` items in a row make up a step
        pieces = iter(self._loader)
        while True:
            parts: list[Made] = []
            for _ in range(self.pieces):
                part = next(pieces)
                if isinstance(part, str):
                    raise UserError(part)
                parts.append(part)
            batch = self.collator.join(parts)
            yield batch.pin_memory() if self.pin_memory else batch

    def close(self) -> None:
        """End the workers, which would else only do so when they are next asked for something."""
        begun: Any = self._loader._iterator
        if begun is not None and self._loader.num_workers:
            # a worker that was killed is ended as well: torch raises this wherever the process is when it hears of it
            with contextlib.suppress(RuntimeError):
                begun._shutdown_workers()
            for worker in begun._workers:
                worker.kill()


def _outlive_the_launcher() -> None:
    """DeepSpeed's launcher, and a terminal, signal loaders with the run that they feed: that still has steps to make
    until all ranks stop, and then ends them itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.setitimer(signal.ITIMER_REAL, _GRACE))


class _Pieces(IterableDataset[Any]):
    """Iterable of one worker's pieces of this rank's batches: its slots of each step, for ever."""

    def __init__(
        self, source: Source, order: GlobalOrder, collator: Collates[Any], first_slot: int, slots: int, start_step: int
    ) -> None:
        self.source, self.order, self.collator = source, order, collator
        self.first_slot, self.slots, self.start_step = first_slot, slots, start_step

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
            _outlive_the_launcher()
        begin, end = (self.first_slot + self.slots * part // count for part in (number, number + 1))
        feed = Feed(self.source, self.order, self.collator.item, begin, end, self.start_step)
        try:
            for items, faults in feed:
                yield self.collator(items, faults)
        except UserError as error:  # carried as text: a DataLoader would wrap the exception in its own traceback
            yield str(error)
        finally:
            feed.close()
