"""Grouping by the user: a table of keys and groups whose samples are no negatives of each other."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sacl_ds.data.draws import hash64
from sacl_ds.errors import UserError, nearest
from sacl_ds.files import require_unchanged

_COLUMNS = "key", "group"
_SHARD = "shard"


class Grouping:
    """Group id of each sample, or an id of its own where it is in none.

    Two arrays of 64 bits a row of the table, which loader workers share.
    """

    def __init__(self, samples: Mapping[int, int]) -> None:
        """Build the table. samples: hash of a sample's name to its group's id."""
        self._names = np.fromiter(samples, np.uint64, len(samples))
        order = np.argsort(self._names)
        self._names = self._names[order]
        self._groups = np.fromiter(samples.values(), np.uint64, len(samples))[order]

    @classmethod
    def load(cls, path: Path) -> Grouping:
        """Read .parquet or .csv with the columns key, group and optionally shard, of which only the base name counts.

        A row without shard is of that key in any shard; a row without group is of none. Raises UserError for a file
        that cannot be read, a missing column, a sample in two groups.
        """
        where = f"data.grouping={path}"
        if not path.is_file():
            raise UserError(
                f"{where}: no such file; correct the path, or make one with tools/weight_analysis.py suspects"
            )
        readers = {".parquet": _parquet_rows, ".csv": _csv_rows}
        if path.suffix.lower() not in readers:
            raise UserError(f"{where}: a grouping's name ends in .parquet or .csv")
        require_unchanged(path.parent, where, path.name)
        samples: dict[int, int] = {}
        for key, group, shard in readers[path.suffix.lower()](path, where):
            if key is None or group in (None, ""):
                continue
            name, number = _name(str(shard or ""), str(key)), hash64(f"group {group}".encode())
            if samples.setdefault(name, number) != number:
                of = f" of shard {shard}" if shard else ""
                raise UserError(f"{where}: sample {key}{of} is in two groups; leave one of them out, or join them")
        return cls(samples)

    def id_of(self, shard: str, key: str) -> int:
        """Return the sample's group id, 64 bits unsigned."""
        own = _name(shard, key)
        for name in (own, _name("", key)):
            place = int(np.searchsorted(self._names, np.uint64(name)))
            if place < len(self._names) and int(self._names[place]) == name:
                return int(self._groups[place])
        return own


def _name(shard: str, key: str) -> int:
    base = shard.partition("?")[0].rpartition("/")[2]
    return hash64(f"{base}\0{key}".encode("utf-8", "surrogateescape"))


def _csv_rows(path: Path, where: str) -> Iterable[tuple[Any, Any, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            columns = _columns(rows.fieldnames or [], where)
            for row in rows:
                yield tuple(row.get(name) for name in columns)  # type: ignore[misc]
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text; convert it") from None
    except (OSError, csv.Error) as error:
        raise _unreadable(where, error) from None


def _parquet_rows(path: Path, where: str) -> Iterable[tuple[Any, Any, Any]]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        columns = _columns(file.schema_arrow.names, where)
        for batch in file.iter_batches(columns=[name for name in columns if name]):
            nothing = [None] * len(batch)
            yield from zip(*(batch.column(name).to_pylist() if name else nothing for name in columns), strict=True)
    except UserError:
        raise
    except (OSError, ValueError, arrow.ArrowException) as error:  # ValueError: a text that is not UTF-8
        raise _unreadable(where, error) from None


def _columns(there: Sequence[str], where: str) -> tuple[str, str, str | None]:
    """Return the names of the columns to read: key, group, and shard or None."""
    for name in _COLUMNS:
        if name not in there:
            near = nearest(name, there)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise UserError(f"{where}: no column {name!r}{hint}; its columns: {', '.join(there)[:200] or 'none'}")
    return (*_COLUMNS, _SHARD if _SHARD in there else None)


def _unreadable(where: str, error: Exception) -> UserError:
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    return UserError(f"{where} cannot be read: {reason}")
