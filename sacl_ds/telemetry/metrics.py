"""metrics.jsonl: one JSON object a line, appended as the run goes, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricLog:
    """The file of one run. An object holds `step` (steps done) and either training figures or `evaluation`."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """resume_step: keep the lines up to this step and go on; None: start anew."""
        kept = [] if resume_step is None else [line for line in read(path) if line["step"] <= resume_step]
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, figures: dict[str, Any]) -> None:
        self._file.write(json.dumps(_plain(figures)) + "\n")

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return lines


def _plain(value: Any) -> Any:
    """Floats to nine digits, which is all of a float32; what JSON has no number for as text."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value
