"""Sample counts of shards: from a cache, from the stats beside them, or by looking through each once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sacl_ds.data.shards.opening import open_shard, reason
from sacl_ds.data.shards.patterns import is_gone, is_remote, missing_shards, named, stats_path
from sacl_ds.data.shards.tars import count_in
from sacl_ds.errors import UserError
from sacl_ds.files import parsed, signed

_THREADS = 16
_AT_ONCE = 64
_PARTS_BETWEEN_WRITES = 16
_ATTEMPTS = 3
_PAUSE = 1.0  # seconds before the second attempt; twice as many before the third
_MOST = 10**8  # samples of a shard
_NAMED = 5  # missing shards
_NO_SUCH = re.compile(r"\b(404|410)\b")  # of HTTP
_LARGEST_STATS = 1 << 20  # bytes
_RULES = 2  # of what a sample is, by which counts were kept


@dataclass(frozen=True)
class ShardIndex:
    """Shards and their sample counts, set by set. missing: shards that are left out."""

    shards: list[str]
    sets: list[list[int]]
    missing: list[str] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        return [count for counts in self.sets for count in counts]

    @property
    def total(self) -> int:
        return sum(map(sum, self.sets))

    @property
    def left_out(self) -> str:
        """Line for the user that names the missing shards."""
        more = f" and {len(self.missing) - _NAMED} more" if len(self.missing) > _NAMED else ""
        of = len(self.shards) + len(self.missing)
        return f"{len(self.missing)} of {of} shards are missing and left out: {', '.join(self.missing[:_NAMED])}{more}"


def index_shards(
    pattern: str | Sequence[str],
    setting: str = "data.shards",
    *,
    several: bool = False,
    typed: bool = False,
    allow_missing: int = 0,
    left_out: Sequence[str] | None = None,
    done: Callable[[int, int], None] = lambda count, total: None,
) -> ShardIndex:
    """Expand patterns and count the samples of each shard.

    several: each of the patterns is a set of its own. typed: as for `expand`. allow_missing: this many missing shards
    are left out. left_out: shards left out earlier, where that is settled: no others then.

    Counts that were found before are kept under $XDG_CACHE_HOME/sacl_ds, with a local shard's size and time of change,
    and hold as long as these do. Raises UserError for shards that are missing, empty or cannot be counted.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    sets = [named(one, setting, typed=typed) for one in (patterns if several else [pattern])]
    shards = [shard for one in sets for shard in one]
    settled, may = set(left_out or ()), allow_missing if left_out is None else 0
    wanted = [shard for shard in shards if shard not in settled]
    gone = {shard for shard in wanted if is_gone(shard)}
    counts: dict[str, int] = {}
    if len(gone) <= may:
        counts = _counts([shard for shard in wanted if shard not in gone], done, len(gone) < may)
        gone |= set(wanted) - counts.keys()
    if gone and (len(gone) > may or not counts):
        why = "" if left_out is None else "the run began with it: put it back, or take it out of the list"
        raise missing_shards([shard for shard in wanted if shard in gone], len(shards), pattern, setting, why)
    index = ShardIndex([s for s in wanted if s in counts], [], [s for s in shards if s not in counts])
    for number, one in enumerate(sets):
        index.sets.append([counts[shard] for shard in one if shard in counts])
        if not sum(index.sets[-1]):
            said = patterns[number] if several else pattern
            raise UserError(f"{setting}: no samples in {len(one)} shards of {said!r}")
    return index


def _counts(shards: list[str], done: Callable[[int, int], None], gaps: bool) -> dict[str, int]:
    """Count shards, with a cache on the disk. gaps: shards that a server does not have are left out."""
    if not shards:
        return {}
    path = _cache_path(shards)
    known = _read(path)
    state_of = {shard: _state(shard) for shard in shards}
    found = {
        shard: entry[-1]
        for shard, state in state_of.items()
        if isinstance(entry := known.get(shard), list) and entry[:-1] == state and _is_count(entry[-1])
    }
    missing = [shard for shard in state_of if shard not in found]
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            counted = zip(part, pool.map(_count_or_none if gaps else count_samples, part), strict=True)
            found.update((shard, count) for shard, count in counted if count is not None)
            done(start + len(part), len(missing))
            if start + len(part) == len(missing) or start // _AT_ONCE % _PARTS_BETWEEN_WRITES == 0:
                _write(path, {shard: [*state_of[shard], count] for shard, count in found.items()})
    return found


class _NotThere(UserError):
    """Raised where a server says that it has no such shard."""


def _count_or_none(shard: str) -> int | None:
    try:
        return count_samples(shard)
    except _NotThere:
        return None


def count_samples(shard: str) -> int:
    """Count a shard's samples by the stats beside it, else by its headers; a remote shard without stats is read
    through.

    A server is asked up to three times, and broken off when it falls silent. Raises UserError.
    """
    for attempt in range(_ATTEMPTS):
        try:
            says = _stats(shard)
            return count_in(shard) if says is None else says
        except OSError as error:
            if not is_remote(shard) or attempt + 1 == _ATTEMPTS:
                why = reason(error)
                kind = _NotThere if isinstance(error, FileNotFoundError) or _NO_SUCH.search(why) else UserError
                raise kind(f"shard {shard} has no stats beside it and cannot be scanned: {why}") from None
            time.sleep(_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _stats(shard: str) -> int | None:
    """Read the count in the stats file beside a shard; None where there is none, or it is not as it was written."""
    with suppress(OSError, KeyError, ValueError, TypeError, RecursionError):
        if not is_remote(shard):
            says = parsed(stats_path(shard).read_bytes())["successes"]
        elif shard.endswith(".tar") and not shard.startswith("pipe:"):
            with open_shard(f"{shard.removesuffix('.tar')}_stats.json") as stream:
                says = parsed(stream.read(_LARGEST_STATS))["successes"]
        else:
            return None
        return says if _is_count(says) else None
    return None


def _is_count(says: Any) -> bool:
    """Return whether a stats file's value, which may be anything, is a number of samples that memory can bear."""
    return type(says) is int and 0 <= says <= _MOST


def _state(shard: str) -> list[int]:
    """Return size and time of change of a local shard; nothing is known of remote ones."""
    if is_remote(shard):
        return []
    status = os.stat(shard)
    return [status.st_size, status.st_mtime_ns]


def _cache_path(shards: list[str]) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = [shard if is_remote(shard) else os.path.abspath(shard) for shard in (shards[0], shards[-1])]
    digest = hashlib.sha256(json.dumps([_RULES, *places, len(shards)]).encode()).hexdigest()[:16]
    return base / "sacl_ds" / f"shards-{digest}.json"


def _read(path: Path) -> dict[str, list[int]]:
    try:
        known = parsed(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, entries: dict[str, list[int]]) -> None:
    """Write the cache atomically; a home that is not writable costs the next start a count."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(signed(entries)))
        temporary.replace(path)
