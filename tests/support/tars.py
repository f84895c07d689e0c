"""Shards for tests, and what a loader makes of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from sacl_ds.config import DataConfig
from sacl_ds.data.batch import Batch, TrainingView
from sacl_ds.data.collate import Collator
from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import TrainView

Fields = dict[str, bytes]


def jpeg(value: int, size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


def sample(number: int) -> tuple[str, Fields]:
    return f"{number:06d}", {"jpg": jpeg(number), "txt": f"picture number {number}".encode()}


def write_tar(path: Path, samples: Iterable[tuple[str, Fields]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, fields in samples:
            for extension, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(folder: Path, sizes: Iterable[int]) -> str:
    """Tars 0.tar, 1.tar, ... of so many samples, numbered through; returns their pattern."""
    first, number = 0, -1
    for number, size in enumerate(sizes):
        write_tar(folder / f"{number}.tar", map(sample, range(first, first + size)))
        first += size
    return str(folder / f"{{0..{number}}}.tar")


@cache
def collator() -> Collator:
    tokenizer = Tokenizer(train_wordpiece([f"picture number {i}" for i in range(60)] * 2, 300), 12)
    return Collator(TrainingView(TrainView(16, (0.5, 1.0), True), tokenizer), seed=5, mlm_probability=0.3)


def loader(
    pattern: str | list[str],
    *,
    batch: int = 12,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    start: int = 0,
    streams: int = 4,
    **data: Any,
) -> BatchLoader:
    settings = DataConfig.model_validate({"source": "shards", "shards": pattern, **data})
    source = ShardSource(index_shards(pattern, several=settings.weights is not None, typed=True), settings)
    order = GlobalOrder(source.sets, batch, 1, streams, 20, source.weights)
    return BatchLoader(source, order, collator(), rank=rank, world=world, workers=workers, start_step=start)


def batches(pattern: str | list[str], steps: int, **options: Any) -> list[Batch]:
    made = loader(pattern, **options)
    try:
        return list(islice(iter(made), steps))
    finally:
        made.close()  # a loader that is collected some time later waits for its processes then


def global_keys(pattern: str | list[str], steps: int, world: int, **options: Any) -> list[list[str]]:
    """The keys of each global batch, in the order of its slots."""
    parts = [batches(pattern, steps, rank=rank, world=world, **options) for rank in range(world)]
    return [[key for part in parts for key in part[step].keys] for step in range(steps)]
