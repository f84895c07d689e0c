"""Patterns of shards (braces, lists in files, several of either), and names in and beside a shard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import braceexpand

from sacl_ds.config.room import expanded, was_typed
from sacl_ds.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of files in a shard, as img2dataset has them

_MOST = 300_000  # shards that one pattern may stand for
# what a list or a saved configuration may name; other protocols of fsspec open files in files and run templates
_PLAIN = ("http", "https", "ftp", "s3", "s3a", "gs", "gcs", "hf", "ais", "az", "abfs", "abfss", "adl", "oci", "hdfs")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


def is_remote(shard: str) -> bool:
    return "://" in shard or shard.startswith("pipe:")


def is_plain(shard: str) -> bool:
    """Return whether a shard is a path or address to fetch: no command (pipe:...), no file within files (a::b)."""
    return "::" not in shard and (not is_remote(shard) or shard.partition("://")[0] in _PLAIN)


def expand(pattern: str | Sequence[str], setting: str = "data.shards", *, typed: bool = False) -> list[str]:
    """Expand '/data/{000..010}.tar', '@list.txt' (a pattern a line), or several of them to the shards, in order.

    typed: the user wrote the pattern himself, on a command line or in Python, and may run commands by it; else only one
    that `sacl_ds.config.room` knows may. Raises UserError for no shard, a missing one, one that is named twice, and a
    command that nobody typed.
    """
    shards = named(pattern, setting, typed=typed)
    if gone := [shard for shard in shards if is_gone(shard)]:
        raise missing_shards(gone, len(shards), pattern, setting)
    return shards


def is_gone(shard: str) -> bool:
    """Return whether a local shard is missing; False for remote ones, of which nothing is known."""
    return not is_remote(shard) and not Path(shard).is_file()


def missing_shards(
    gone: Sequence[str], of: int, pattern: str | Sequence[str], setting: str, why: str = ""
) -> UserError:
    """Return the error line for missing shards. why: what to do, where the pattern is right."""
    more = f" (and {len(gone) - 1} more of {of})" if len(gone) > 1 else ""
    shown = repr(pattern) if isinstance(pattern, str) else ", ".join(map(repr, pattern))
    advice = why or f"correct the pattern {shown}"
    if setting == "data.shards" and len(gone) < of and not why:
        advice += f", or leave gaps out with data.allow_missing={len(gone)}"
    return UserError(f"{setting}: shard {gone[0]} does not exist{more}; {advice}")


def named(pattern: str | Sequence[str], setting: str = "data.shards", *, typed: bool = False) -> list[str]:
    """Expand patterns like `expand`, but without checking that the shards exist."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    shards = [shard for one in patterns for shard in _expand(one.strip(), setting, typed)]
    if not shards:
        raise UserError(f"{setting} is an empty list of shards; give e.g. {setting}='/data/{{000..010}}.tar'")
    if len(set(shards)) < len(shards):
        twice = next(shard for number, shard in enumerate(shards) if shard in shards[:number])
        raise UserError(f"{setting}: shard {twice} is named twice; name it once")
    return shards


def _expand(pattern: str, setting: str, typed: bool) -> list[str]:
    if pattern.startswith("["):
        raise UserError(f'{setting}={pattern}: entries of a list stand in quotes: \'["/a/{{0..9}}.tar", "@b.txt"]\'')
    typed = typed or was_typed(pattern)
    pattern = expanded(pattern)
    if not pattern.startswith("@"):
        shards = sorted(_braces(pattern, setting)) if pattern else []
        return shards if typed else _require_plain(shards, setting)
    try:
        lines = Path(pattern[1:]).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: the list {pattern[1:]} cannot be read: {_reason(error)}") from None
    lines = [line.strip() for line in lines]
    shards = [
        shard for line in lines if line and not line.startswith("#") for shard in _braces(expanded(line), setting)
    ]
    return _require_plain(shards, f"{setting}: the list {pattern[1:]}")


def _require_plain(shards: list[str], where: str) -> list[str]:
    """Return the shards. Raises UserError where one runs a command, or is opened by other means than fetching it."""
    for shard in shards:
        if not is_plain(shard):
            what = "runs a command" if shard.startswith("pipe:") else "is opened by other means than fetching it"
            raise UserError(
                f"{where}: {shard[:80]!r} {what}, which is done only where you type it; give it on the "
                "command line in place of this"
            )
    return shards


def _braces(pattern: str, setting: str) -> list[str]:
    many = UserError(f"{setting}: {pattern[:80]!r} stands for more than {_MOST} shards; write a smaller range")
    try:
        if any(abs(int(last) - int(first)) >= _MOST for first, last in _RANGE.findall(pattern)):
            raise many  # before its numbers are made
        shards = list(islice(braceexpand.braceexpand(pattern), _MOST + 1))
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError(f"{setting}: braces do not match in {pattern!r}; write e.g. '/data/{{000..010}}.tar'") from None
    if len(shards) > _MOST:
        raise many
    if "\0" in pattern:
        raise UserError(f"{setting}: {pattern!r} holds a zero byte, which no name has; correct it")
    return shards


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "no text"


def stats_path(shard: str | Path) -> Path:
    """Return the path of a shard's stats file: 00012.tar -> 00012_stats.json."""
    shard = Path(shard)
    return shard.with_name(f"{shard.stem}_stats.json")
