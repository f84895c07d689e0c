"""Which shards: brace patterns, lists in files, several of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import braceexpand

from sacl_ds.errors import UserError


def is_remote(shard: str) -> bool:
    return "://" in shard or shard.startswith("pipe:")


def expand(pattern: str | Sequence[str], setting: str = "data.shards") -> list[str]:
    """'/data/{000..010}.tar', '@list.txt' (a pattern a line), or several of them -> the shards, in order.

    Raises UserError for no shard, a missing one, or one that is named twice.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    shards = [shard for one in patterns for shard in _expand(one.strip(), setting)]
    if not shards:
        raise UserError(f"{setting} is an empty list of shards; give e.g. {setting}='/data/{{000..010}}.tar'")
    missing = [shard for shard in shards if not is_remote(shard) and not Path(shard).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(shards)})" if len(missing) > 1 else ""
        shown = repr(pattern) if isinstance(pattern, str) else ", ".join(map(repr, patterns))
        raise UserError(f"{setting}: shard {missing[0]} does not exist{more}; correct the pattern {shown}")
    if len(set(shards)) < len(shards):
        twice = next(shard for number, shard in enumerate(shards) if shard in shards[:number])
        raise UserError(f"{setting}: shard {twice} is named twice; name it once")
    return shards


def _expand(pattern: str, setting: str) -> list[str]:
    if pattern.startswith("["):
        raise UserError(f'{setting}={pattern}: entries of a list stand in quotes: \'["/a/{{0..9}}.tar", "@b.txt"]\'')
    if not pattern.startswith("@"):
        return sorted(_braces(pattern, setting)) if pattern else []
    try:
        lines = Path(pattern[1:]).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}: the list {pattern[1:]} cannot be read: {_reason(error)}") from None
    lines = [line.strip() for line in lines]
    return [shard for line in lines if line and not line.startswith("#") for shard in _braces(line, setting)]


def _braces(pattern: str, setting: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError:
        raise UserError(f"{setting}: braces do not match in {pattern!r}; write e.g. '/data/{{000..010}}.tar'") from None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "no text"
