"""What the tests of attacks are made with."""

import os
from pathlib import Path

import pytest

from sacl_ds.errors import UserError
from sacl_ds.telemetry.records import DIRECTIONS, FIGURES, LOWEST, WeightRecords


class Writes:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    said = str(error.value)
    assert said.isprintable()
    return said


def records_of(folder: Path, shard: str, caption: str = "a dog") -> None:
    """Weight records whose lightest pairs are said to be in `shard`."""
    row: dict = dict.fromkeys(FIGURES.names[2:], 0.25)
    row |= {"anchors": 8, "pairs": 56, "duplicates": 0, "histogram": [0] * 122, "quantiles": [0.1] * 11}
    row["under"] = [0.5] * 9
    low = dict.fromkeys(LOWEST.names[2:], shard) | {"place": 0, "weight": 0.1}
    low |= {"student_similarity": 0.5, "teacher_similarity": 0.5, "anchor_caption": caption, "anchor_key": caption}
    low |= {"negative_caption": caption}
    rows = [{**row, "direction": direction} for direction in DIRECTIONS]
    WeightRecords(folder).write(5, rows, [{**low, "direction": direction} for direction in DIRECTIONS])
