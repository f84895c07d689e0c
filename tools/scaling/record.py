"""Record docs/lab/scaling_measured.json: measurements of tools for docs/lab/scaling.md, each its own part of it.

{"rows": of `tools/measure_scaling.py`, {"case", "measured"} each, "limited": of `tools/show_offload.py`, {"parameters",
"limit", "arms": lines}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sacl_ds.errors import UserError


def read_record(path: Path) -> dict[str, Any]:
    """Read the record; it has no rows where the file does not exist. Raises UserError where it holds something else."""
    if not path.exists():
        return {"rows": []}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); name another file, or remove it") from None
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise UserError(f'{path}: no record of measurements: it has no "rows"; name another file')
    return found


def record_row(path: Path, row: dict[str, Any]) -> None:
    """Insert a row, or replace the row of the same case; rows are sorted by kind, precision, ranks and stage."""
    record = read_record(path)
    rows = [each for each in record["rows"] if each["case"] != row["case"]]
    _write(path, record | {"rows": sorted([*rows, row], key=lambda each: _order(each["case"]))})


def record_limited(path: Path, limited: dict[str, Any]) -> None:
    """Replace the earlier findings of `tools/show_offload.py`."""
    _write(path, read_record(path) | {"limited": limited})


def _order(case: dict[str, Any]) -> tuple[Any, ...]:
    return (
        case["size"], case["pairs"], case["precision"] != "fp32", case["micro_batches"], case["coalesced"],
        case["checkpointed"], case["itc_alone"], case["world"], case["stage"], case["offload"],
    )  # fmt: skip


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")
