"""The loader: one rank's part of every global batch, made by worker processes.

A worker owns some of the rank's slots and makes them for every step; the main process joins the workers' pieces. So
which samples a global batch holds depends on `GlobalOrder` alone, with any number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sacl_ds.data.batch import Batch, concatenate
from sacl_ds.data.collate import Collator
from sacl_ds.data.feed import Feed
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.sample import Source
from sacl_ds.errors import UserError

_PREFETCHED = 4  # pieces a worker makes ahead


class PairLoader:
    """Iterates over this rank's batches from `start_step` on, for ever."""

    def __init__(
        self,
        source: Source,
        order: GlobalOrder,
        collator: Collator,
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
        )

    def __iter__(self) -> Iterator[Batch]:
        pad_id = self.collator.view.tokenizer.pad_id
        teacher = self.collator.teacher or self.collator.view
        # DataLoader takes one item from each worker in turn, so `pieces` items in a row make up a step
        pieces = iter(self._loader)
        while True:
            parts: list[Batch] = []
            for _ in range(self.pieces):
                part = next(pieces)
                if isinstance(part, str):
                    raise UserError(part)
                parts.append(part)
            batch = concatenate(parts, pad_id, teacher.tokenizer.pad_id)
            yield batch.pin_memory() if self.pin_memory else batch


class _Pieces(IterableDataset[Any]):
    """Endless pieces of this rank's batches: one worker's slots of each step."""

    def __init__(
        self, source: Source, order: GlobalOrder, collator: Collator, first_slot: int, slots: int, start_step: int
    ) -> None:
        self.source, self.order, self.collator = source, order, collator
        self.first_slot, self.slots, self.start_step = first_slot, slots, start_step

    def __iter__(self) -> Iterator[Batch | str]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
        begin, end = (self.first_slot + self.slots * part // count for part in (number, number + 1))
        feed = Feed(self.source, self.order, self.collator.item, begin, end, self.start_step)
        try:
            for items, faults in feed:
                yield self.collator(items, faults)
        except UserError as error:  # carried as text: a DataLoader would wrap the exception in its own traceback
            yield str(error)
        finally:
            feed.close()
