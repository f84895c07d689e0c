"""Metric log metrics.jsonl: one JSON object a line, appended as the run goes, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sacl_ds.checksums import require_unchanged
from sacl_ds.errors import FULL, UserError

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
