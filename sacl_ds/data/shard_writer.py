"""Writes samples as webdataset shards in img2dataset's layout: tar of key.jpg, key.txt, key.json, counts beside it.

A shard appears under its final name only when it is whole and on disk; its count is written after it. A run that was
stopped goes on with the first shard that has no count.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sacl_ds.data.shards import stats_path
from sacl_ds.errors import UserError


@dataclass(frozen=True)
class Record:
    """One sample to be written. `load` gives the encoded image and its extension; it runs only if the shard is made."""

    key: str
    captions: Sequence[str]
    load: Callable[[], tuple[bytes, str]]
    meta: dict[str, Any]


def write_shards(
    records: Sequence[Record], folder: Path, per_shard: int, finished: Callable[[int], None] = lambda count: None
) -> tuple[int, int]:
    """Write records in their order, `per_shard` to a tar; finished(n) is called as samples are done.

    Returns (shards written now, shards that were there already). Raises UserError where the folder holds shards of
    another list or size, or a record cannot be loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(records), per_shard)
    digits = max(5, len(str(len(starts))))
    written = kept = 0
    for number, start in enumerate(starts):
        part = records[start : start + per_shard]
        path = folder / f"{number:0{digits}d}.tar"
        if _is_done(path, part):
            kept += 1
            finished(len(part))
            continue
        _write_shard(path, part, finished)
        written += 1
    stray = folder / f"{len(starts):0{digits}d}.tar"
    if stray.exists():
        raise UserError(f"{stray} is left of an earlier, longer list; remove it or write to another folder")
    return written, kept


def _is_done(path: Path, part: Sequence[Record]) -> bool:
    if not path.exists() or not stats_path(path).exists():
        return False
    stats = json.loads(stats_path(path).read_text())
    if (stats.get("successes"), stats.get("first_key"), stats.get("last_key")) != (
        len(part),
        part[0].key,
        part[-1].key,
    ):
        raise UserError(f"{path} holds other samples than this list would put there; write to another folder")
    return True


def _write_shard(path: Path, part: Sequence[Record], finished: Callable[[int], None]) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record in part:
                for name, data in _members(record):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                finished(1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    stats = {"count": len(part), "successes": len(part), "first_key": part[0].key, "last_key": part[-1].key}
    side = stats_path(path).with_name(f".{stats_path(path).name}.writing")
    side.write_text(json.dumps(stats, indent=2))
    side.replace(stats_path(path))


def _members(record: Record) -> Iterator[tuple[str, bytes]]:
    image, extension = record.load()
    captions = list(record.captions)
    meta = {"key": record.key, "caption": captions[0], "captions": captions, **record.meta}
    yield f"{record.key}.{extension}", image
    yield f"{record.key}.txt", captions[0].encode()
    yield f"{record.key}.json", json.dumps(meta).encode()
