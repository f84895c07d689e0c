"""Reading and validation of a run's records: a run directory may be anybody's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sacl_ds.errors import UserError
from sacl_ds.losses.distribution import EDGES, THRESHOLDS
from sacl_ds.telemetry.metrics import METRICS, read
from sacl_ds.telemetry.weight_records import DIRECTIONS, FOLDER, QUANTILES, read_figures, read_lowest

_LENGTHS = {"histogram": len(EDGES) - 1, "quantiles": len(QUANTILES), "under": len(THRESHOLDS)}
_LARGEST = 1e30  # of a figure that can be drawn

Record = dict[str, Any]


def recorded(folder: Path, until: int | None = None) -> tuple[list[Record], list[Record], list[Record]]:
    """(figures, the lightest pairs of the last step, lines of metrics.jsonl), up to that step. Raises UserError where
    there are no records, or what stands there cannot be a run's."""
    figures, metrics, last = read_figures(folder), read(folder / METRICS), None
    if until is not None:
        figures, metrics = ([line for line in lines if line["step"] <= until] for lines in (figures, metrics))
        if not figures:
            raise UserError(
                f"{folder / FOLDER}: no step up to {until} was recorded; give a later checkpoint, or {folder}"
            )
        last = figures[-1]["step"]
    lowest = read_lowest(folder, last)
    here = f"{folder / FOLDER}: the record of step"
    for record in figures:
        if wrong := _wrong_figures(record):
            raise UserError(f"{here} {record['step']} has {wrong}; remove its file")
    for step in sorted({record["step"] for record in figures}):
        if sorted(record["direction"] for record in figures if record["step"] == step) != sorted(DIRECTIONS):
            raise UserError(f"{here} {step} has not one row a direction; remove its file")
    for line in metrics:
        if wrong := _wrong_line(line):
            raise UserError(f"{folder / METRICS}: a line of step {line['step']} has {wrong}; remove it")
    return figures, lowest, metrics


def _wrong_figures(record: Record) -> str | None:
    for name, length in _LENGTHS.items():
        if len(record[name]) != length or not all(map(_is_number, record[name])):
            return f"not {length} numbers under {name!r}"
    if not all(0 <= count < 2**53 for count in (record["step"], record["pairs"], *record["histogram"])):
        return "counts that no run has"
    too_large = (name for name, value in record.items() if isinstance(value, float) and abs(value) > _LARGEST)
    found = next(too_large, None)
    return f"a figure {found!r} that cannot be drawn" if found else None


def _wrong_line(line: Record) -> str | None:
    if not 0 <= line["step"] < 2**53:
        return "a step that no run has"
    if not _is_number(line.get("duplicate_pairs", 0)):
        return "no number under 'duplicate_pairs'"
    for name in ("evaluation", "chance"):
        figures = line.get(name, {})
        if not isinstance(figures, dict) or not all(isinstance(value, (int, float, str)) for value in figures.values()):
            return f"no figures under {name!r}"
    return None if line.get("evaluation", True) else "no figures under 'evaluation'"


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, or the text that stands for an unknown one."""
    return type(value) in (int, float) and (abs(value) <= _LARGEST or math.isnan(value))
