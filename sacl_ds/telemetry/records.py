"""What a run writes as it goes: metrics.jsonl, and the records of its weights in weights/."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow import parquet

from sacl_ds.errors import FULL, UserError
from sacl_ds.files import require_unchanged

METRICS = "metrics.jsonl"


class MetricLog:
    """Metric log of one run. An object holds `step` (steps done) and either training metrics or `evaluation`."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Open the file. resume_step: keep the lines up to this step and go on; None: start anew. Raises UserError
        where it cannot be written."""
        self._path = path
        kept = [] if resume_step is None else [line for line in read(path) if line["step"] <= resume_step]
        temporary = path.with_name(f".{path.name}.writing")
        try:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(path)
            self._file = path.open("ab", buffering=0)  # no line is left in a buffer, to be lost or to fail later
        except OSError as error:
            raise self._cannot_write(error) from None

    def write(self, figures: dict[str, Any]) -> None:
        """Raises UserError where it cannot be written."""
        line = (json.dumps(_plain(figures)) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> UserError:
        reason = "the disk is full" if error.errno in FULL else error.strerror
        return UserError(f"{self._path} cannot be written: {reason}; put that right, and go on with --resume")

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Read all complete lines; a last line that a kill cut short is left out.

    Raises UserError for a file that is no text, or not as its finished run left it, and for a line that is JSON but no
    object with a whole number `step`. While a run goes on, a changed digit cannot be told from a written one.
    """
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    require_unchanged(path.parent, str(path.parent), path.name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    for number, line in enumerate(text.split("\n"), 1):
        try:
            read = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not (isinstance(read, dict) and type(read.get("step")) is int):
            raise UserError(f"{path} line {number}: no object with a whole number 'step'; remove that line")
        lines.append(read)
    return lines


def _plain(value: Any) -> Any:
    """Round floats to nine digits, which is all of a float32; values that JSON lacks become text."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value


FOLDER = "weights"
DIRECTIONS = ("image_to_text", "text_to_image")
QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)

Row = Mapping[str, Any]

_INT, _FLOAT, _TEXT = arrow.int64(), arrow.float64(), arrow.string()
FIGURES = arrow.schema(
    {
        "step": _INT,
        "direction": _TEXT,
        "alpha": _FLOAT,
        "sharpness": _FLOAT,
        "teacher_sharpness": _FLOAT,
        "logit_scale": _FLOAT,
        "anchors": _INT,
        "pairs": _INT,
        "duplicates": _INT,
        "histogram": arrow.list_(_INT),
        "quantiles": arrow.list_(_FLOAT),
        "under": arrow.list_(_FLOAT),
        "effective": _FLOAT,
        "effective_share": _FLOAT,
        "mass": _FLOAT,
        "shape": _FLOAT,
        "pmi_positive": _FLOAT,
        "pmi_negative": _FLOAT,
        "pmi_negative_target": _FLOAT,
        "infonce_bound": _FLOAT,
    }.items()
)
LOWEST = arrow.schema(
    {
        "step": _INT,
        "direction": _TEXT,
        "place": _INT,
        "anchor_key": _TEXT,
        "anchor_shard": _TEXT,
        "anchor_caption": _TEXT,
        "negative_key": _TEXT,
        "negative_shard": _TEXT,
        "negative_caption": _TEXT,
        "weight": _FLOAT,
        "student_similarity": _FLOAT,
        "teacher_similarity": _FLOAT,
    }.items()
)
_SCHEMAS = {"figures": FIGURES, "lowest": LOWEST}


class WeightRecords:
    """Writer of one run's records."""

    def __init__(self, run_folder: Path, resume_step: int | None = None) -> None:
        """Open the records. resume_step: keep those up to this step; None: start anew. Raises UserError where that
        fails."""
        self.folder = run_folder / FOLDER
        try:
            for step, path in _files(run_folder, "*"):
                if resume_step is None or step > resume_step:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    def write(self, step: int, figures: Sequence[Row], lowest: Sequence[Row]) -> None:
        """Write rows with FIGURES' and LOWEST's columns but `step`. Raises UserError where they cannot be written."""
        for name, rows in (("lowest", lowest), ("figures", figures)):
            _write(self.folder / f"{name}_{step:08d}.parquet", [{"step": step, **row} for row in rows], _SCHEMAS[name])


def read_figures(run_folder: Path) -> list[dict[str, Any]]:
    """Read all rows of FIGURES, by step and direction. Raises UserError where there are none."""
    files = _whole(run_folder, "figures")
    rows = [row for _, path in files for row in _read(path, FIGURES)]
    return sorted(rows, key=lambda row: (row["step"], row["direction"]))


def read_lowest(run_folder: Path, step: int | None = None) -> list[dict[str, Any]]:
    """Read one recorded step's rows of LOWEST (None: the last step), by direction and position.

    There are none where all negatives weighed the same. Raises UserError where that step was not recorded.
    """
    files = dict(_whole(run_folder, "lowest"))
    if step is None:
        step = max(files)
    if step not in files:
        near = min(files, key=lambda other: abs(other - step))
        raise UserError(f"{run_folder / FOLDER}: step {step} was not recorded; the nearest that was is {near}")
    return sorted(_read(files[step], LOWEST), key=lambda row: (row["direction"], row["place"]))


def _whole(run_folder: Path, name: str) -> list[tuple[int, Path]]:
    """Raises UserError where there are none, or where one is not as its finished run left it."""
    require_unchanged(run_folder, str(run_folder), FOLDER)
    files = _files(run_folder, name)
    if not files:
        raise _nothing(run_folder)
    return files


def _files(run_folder: Path, name: str) -> list[tuple[int, Path]]:
    """List the run's files of that name, sorted by step."""
    found = []
    for path in (run_folder / FOLDER).glob(f"{name}_*.parquet"):
        if match := re.fullmatch(r"(?:figures|lowest)_(\d+)\.parquet", path.name):
            found.append((int(match[1]), path))
    return sorted(found)


def _write(path: Path, rows: Sequence[Row], schema: arrow.Schema) -> None:
    if any(set(row) != set(schema.names) for row in rows):
        raise ValueError(f"{path.name}: the columns are {', '.join(schema.names)}")
    table = arrow.Table.from_pylist([_encodable(row) for row in rows], schema)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, temporary)
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _encodable(row: Row) -> dict[str, Any]:
    """Replace what UTF-8 has no bytes for: JSON can spell half a surrogate pair into a caption."""
    return {name: x.encode("utf-8", "replace").decode() if isinstance(x, str) else x for name, x in row.items()}


def _read(path: Path, schema: arrow.Schema) -> list[dict[str, Any]]:
    """Read rows with the columns and types of `schema`. Raises UserError for a file that is damaged or of something
    else."""
    try:
        table = parquet.ParquetFile(path).read()
        if sorted(table.schema.names) != sorted(schema.names):
            raise ValueError(f"its columns are {', '.join(table.schema.names)[:80]}")
        table = table.select(schema.names).cast(schema)
        for column in schema:
            if table[column.name].null_count and column.type != _FLOAT:
                raise ValueError(f"values of {column.name} are missing")
        rows: list[dict[str, Any]] = table.to_pylist()
        if any(row["direction"] not in DIRECTIONS for row in rows):
            raise ValueError(f"a direction is neither {' nor '.join(DIRECTIONS)}")
    except (OSError, ValueError, MemoryError, arrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}; remove it") from None
    return rows


def _cannot_write(path: Path, error: OSError) -> UserError:
    reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
    reason = "the disk is full" if error.errno in FULL else reason
    return UserError(f"{path} cannot be written: {reason}; put that right, or train with records.every=0")


def _nothing(run_folder: Path) -> UserError:
    if not run_folder.is_dir():
        return UserError(f"{run_folder} does not exist; give the directory of a run")
    return UserError(f"{run_folder / FOLDER} holds no weight records; train with records.every=100, say")
