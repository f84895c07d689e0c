"""The loader: one rank's part of every global batch, made by worker processes.

A worker owns some of the rank's slots and makes them for every step; the main process joins the workers' pieces. So
which samples a global batch holds depends on `GlobalOrder` alone, with any number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sacl_ds.data.batch import Batch, Collator, concatenate
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.sample import Source
from sacl_ds.errors import UserError


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
        self.collator = collator
        self.pieces = max(1, min(workers, per_rank))
        self._loader: DataLoader[Any] = DataLoader(
            _Pieces(source, order, collator, rank * per_rank, per_rank, start_step),
            batch_size=None,
            num_workers=self.pieces if workers else 0,
            prefetch_factor=4 if workers else None,
            pin_memory=pin_memory,
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
            yield concatenate(parts, pad_id, teacher.tokenizer.pad_id)


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
        try:
            yield from self._make(begin, end)
        except UserError as error:  # carried as text: a DataLoader would wrap the exception in its own traceback
            yield str(error)

    def _make(self, begin: int, end: int) -> Iterator[Batch]:
        order = self.order
        streams = [
            _stream(self.source, order, stream, begin, end, self.start_step)
            for stream in range(order.stream_of(begin), order.stream_of(end - 1) + 1)
        ]
        while True:
            chosen = [pair for stream in streams for pair in next(stream)]
            samples = [self.source.decode(raw) for raw, _ in chosen]
            yield self.collator(samples, [epoch for _, epoch in chosen])


def _stream(
    source: Source, order: GlobalOrder, stream: int, begin: int, end: int, start_step: int
) -> Iterator[list[tuple[Any, int]]]:
    """For each step from start_step on: (undecoded sample, epoch) of the stream's slots in [begin, end)."""
    width = order.slots_per_stream
    low, high = max(begin - stream * width, 0), min(end - stream * width, width)
    reader = source.reader()
    position = start_step * width
    step: list[tuple[Any, int]] = []
    for places, serve, skip in order.blocks(stream, position):
        wanted = [False] * len(places)
        for number, index in enumerate(serve[skip:]):
            wanted[index] = low <= (position + number) % width < high
        raw = reader.fetch(places, wanted)
        for index in serve[skip:]:
            if wanted[index]:
                step.append((raw[index], places[index].epoch))
            position += 1
            if position % width == 0:
                yield step
                step = []
