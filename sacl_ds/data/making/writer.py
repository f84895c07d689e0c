"""Writes samples as webdataset shards in img2dataset's layout: tar of key.jpg, key.txt, key.json, counts beside it.

Shard n holds the records from n * per_shard on, less those that are broken and may be left out: so a shard depends on
its own stretch of the list alone, whatever was broken before it. It appears under its final name only when it is whole
and on disk; its stats are written after it. A run that was stopped goes on with the first shard that has no stats.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sacl_ds.data.images import BadImage, examine
from sacl_ds.data.making.record import BrokenSample, Record
from sacl_ds.data.shards.patterns import stats_path
from sacl_ds.errors import UserError
from sacl_ds.files import parsed, signed

SKIPPED = "skipped.jsonl"
_THREADS = 4
_AHEAD = 32  # images read and decoded before they are written


def write_shards(
    records: Iterable[Record],
    folder: Path,
    per_shard: int,
    finished: Callable[[int], None] = lambda count: None,
    *,
    total: int | None = None,
    skip_broken: bool = False,
) -> tuple[int, int]:
    """Write records in their order, `per_shard` of the list to a tar; finished(n) is called as records are done.

    records: read once, front to back; memory does not grow with their number. total: how many, where that is known.
    skip_broken: leave out what cannot be written and note it in the shard's stats, where `list_skipped` finds it.
    Returns (shards written now, shards that were there already). Raises UserError where the folder holds shards of
    another list or size, a record cannot be written, or the disk is full.
    """
    if per_shard < 1:
        raise UserError(f"--per-shard {per_shard}: a shard holds at least one sample")
    if total is None and isinstance(records, Sized):
        total = len(records)
    shards = None if total is None else -(-total // per_shard)
    digits = max(5, len(str(shards or 0)))
    folder.mkdir(parents=True, exist_ok=True)
    if shards is not None:
        _refuse_stray(folder, shards, digits)
    iterator = iter(records)
    written = kept = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for number in itertools.count():
            first = next(iterator, None)
            if first is None:
                break
            if len(str(number)) > digits:
                raise UserError(f"more than {number} shards: their names would not sort; give a larger --per-shard")
            part = itertools.chain([first], itertools.islice(iterator, per_shard - 1))
            path = folder / f"{number:0{digits}d}.tar"
            stats = _read_stats(path)
            if stats is not None:
                _compare(path, stats, part, skip_broken, finished)
                kept += 1
            else:
                _write_shard(path, part, pool, skip_broken, finished)
                written += 1
    _refuse_stray(folder, written + kept, digits)
    return written, kept


def list_skipped(folder: Path) -> Counter[str]:
    """Gather what the shards in `folder` left out into its skipped.jsonl; returns how many samples, by reason.

    The file has a line for each, in order; there is none where nothing was left out.
    """
    counts: Counter[str] = Counter()
    path = folder / SKIPPED
    temporary = _unfinished(path)
    with _room_for(temporary), temporary.open("w") as file:
        for shard in sorted(folder.glob("*.tar")):
            for entry in (_read_stats(shard) or {}).get("skipped", ()):
                counts[entry["reason"]] += 1
                file.write(json.dumps({"shard": shard.name, **entry}) + "\n")
    if counts:
        temporary.replace(path)
    else:
        temporary.unlink()
        path.unlink(missing_ok=True)
    return counts


class _ShardDigest:
    """Digest of a shard's stretch of the list, images aside, by which a later run knows the shard for its own."""

    def __init__(self) -> None:
        self.count = 0
        self.first_key = self.last_key = ""
        self.digest = hashlib.blake2b(digest_size=16)

    def add(self, record: Record) -> Record:
        self.first_key = self.first_key if self.count else record.key
        self.last_key = record.key
        self.count += 1
        self.digest.update(json.dumps([record.key, list(record.captions), record.meta], sort_keys=True).encode())
        return record

    def stats(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "first_key": self.first_key,
            "last_key": self.last_key,
            "list_digest": self.digest.hexdigest(),
        }


def _refuse_stray(folder: Path, shards: int, digits: int) -> None:
    stray = folder / f"{shards:0{digits}d}.tar"
    if stray.exists():
        raise UserError(f"{stray} is left of an earlier, longer list; remove it or write to another folder")


def _read_stats(path: Path) -> dict[str, Any] | None:
    """Read the stats of a finished shard; None for one that is to be written."""
    if not path.exists():
        return None
    with suppress(OSError, ValueError):
        stats = parsed(stats_path(path).read_text())
        return stats if isinstance(stats, dict) else None
    return None


def _compare(
    path: Path,
    stats: dict[str, Any],
    records: Iterable[Record],
    skip_broken: bool,
    finished: Callable[[int], None],
) -> None:
    part = _ShardDigest()
    for record in records:
        part.add(record)
        finished(1)
    if any(stats.get(name) != value for name, value in part.stats().items()):
        raise UserError(f"{path} holds other samples than this list would put there; write to another folder")
    skipped = stats.get("skipped", [])
    if skipped and not skip_broken:
        raise UserError(
            f"{path} was written with --skip-broken and leaves out {len(skipped)}, first {skipped[0]['where']}: "
            f"{skipped[0]['reason']}; give --skip-broken again, or write to another folder"
        )


def _write_shard(
    path: Path,
    records: Iterable[Record],
    pool: ThreadPoolExecutor,
    skip_broken: bool,
    finished: Callable[[int], None],
) -> None:
    part = _ShardDigest()
    skipped: list[dict[str, str]] = []
    written = 0
    temporary = _unfinished(path)
    with _room_for(temporary), temporary.open("wb", buffering=1 << 20) as file:
        for record, future in _in_order(pool, (part.add(record) for record in records), skip_broken):
            try:
                members, left_out = future.result()
            except BrokenSample as broken:
                if not skip_broken:
                    raise UserError(
                        f"{record.where or record.key}: {broken}; "
                        "correct it, or leave such samples out with --skip-broken"
                    ) from None
                members, left_out = b"", [broken]
            written += bool(members)
            file.write(members)
            skipped += [
                {"key": record.key, "where": record.where, "reason": broken.kind, "detail": broken.detail}
                for broken in left_out
            ]
            finished(1)
        end = file.tell() + 2 * tarfile.BLOCKSIZE  # two empty blocks, then up to a whole record
        file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    stats = {**part.stats(), "successes": written, **({"skipped": skipped} if skipped else {})}
    side = _unfinished(stats_path(path))
    with _room_for(side):
        side.write_text(json.dumps(signed(stats), indent=2))
    side.replace(stats_path(path))


_Members = tuple[bytes, list[BrokenSample]]


def _in_order(
    pool: ThreadPoolExecutor, records: Iterable[Record], skip_broken: bool
) -> Iterator[tuple[Record, Future[_Members]]]:
    """Yield records in order with their members, prepared by the pool a little ahead."""
    waiting: deque[tuple[Record, Future[_Members]]] = deque()
    for record in records:
        waiting.append((record, pool.submit(_members, record, skip_broken)))
        if len(waiting) >= _AHEAD:
            yield waiting.popleft()
    yield from waiting


def _members(record: Record, skip_broken: bool) -> _Members:
    """(the sample's files as they stand in a tar, captions left out of it). Raises BrokenSample."""
    captions = record.checked_captions(drop_empty=skip_broken)
    image = record.load()
    try:
        extension = examine(image).extension
    except BadImage as error:
        raise BrokenSample("image does not decode", f"{record.meta.get('filename', '')} {error}".strip()) from None
    meta = json.dumps({"key": record.key, "caption": captions[0], "captions": captions, **record.meta}).encode()
    contents = ((extension, image), ("txt", captions[0].encode()), ("json", meta))
    members = b"".join(part for suffix, data in contents for part in _tar_member(f"{record.key}.{suffix}", data))
    dropped = len(record.captions) - len(captions)
    return members, [BrokenSample("empty caption", "the sample is kept")] * dropped


def _tar_member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Encode a tar member: header, content, zeros up to a whole block.

    The bytes are those of TarFile.addfile, which keeps all headers in memory.
    """
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    return header, data, bytes(-len(data) % tarfile.BLOCKSIZE)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Remove the file if writing it fails; a full disk becomes one line."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {path.parent} has no room for another shard; "
                "free some space and give the same command again, which goes on there"
            ) from None
        raise
