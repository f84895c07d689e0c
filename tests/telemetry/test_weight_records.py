"""Records of the weights: what is written is read again; a resumed run, a full disk, damage."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

from sacl_ds.errors import UserError
from sacl_ds.telemetry.records import DIRECTIONS, FIGURES, LOWEST, WeightRecords, read_figures, read_lowest


def figures(direction: str, mass: float = -0.5) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(FIGURES.names[2:], 0.25)
    row |= {"direction": direction, "anchors": 8, "pairs": 56, "duplicates": 0, "mass": mass, "pmi_positive": math.nan}
    return row | {"histogram": [0, 50, 6], "quantiles": [0.1, 0.2], "under": [0.0, 0.5]}


def lowest(direction: str, place: int) -> dict[str, object]:
    pair = {f"{one}_{what}": f"{one} {what} {place}" for one in ("anchor", "negative") for what in ("key", "shard")}
    captions = {"anchor_caption": "übergroß, \ud83d", "negative_caption": ""}
    numbers = {"weight": 0.1 * place, "student_similarity": 0.5, "teacher_similarity": math.nan}
    return {"direction": direction, "place": place, **pair, **captions, **numbers}


def write(folder: Path, *steps: int, resume_step: int | None = None) -> None:
    records = WeightRecords(folder, resume_step)
    for step in steps:
        low = [lowest(direction, place) for direction in reversed(DIRECTIONS) for place in (1, 0)]
        records.write(step, [figures(direction, -step) for direction in reversed(DIRECTIONS)], low)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 100, 1)
    rows = read_figures(tmp_path)
    assert [(row["step"], row["direction"]) for row in rows] == [(s, d) for s in (1, 100) for d in DIRECTIONS]
    assert rows[0]["mass"] == -1
    assert rows[3]["histogram"] == [0, 50, 6]
    assert math.isnan(rows[0]["pmi_positive"])
    low = read_lowest(tmp_path)
    assert [(row["step"], row["direction"], row["place"]) for row in low] == [
        (100, direction, place) for direction in DIRECTIONS for place in (0, 1)
    ]
    assert low[1]["weight"] == 0.1
    assert low[0]["anchor_caption"] == "übergroß, ?"
    assert {row["step"] for row in read_lowest(tmp_path, 1)} == {1}
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == {f"{kind}_{step:08d}.parquet" for kind in ("figures", "lowest") for step in (1, 100)}
    assert parquet.read_schema(tmp_path / "weights/lowest_00000001.parquet").names == LOWEST.names


def test_no_pairs_are_a_record_too(tmp_path: Path) -> None:
    WeightRecords(tmp_path).write(5, [figures(direction) for direction in DIRECTIONS], [])
    assert read_lowest(tmp_path) == []
    assert len(read_figures(tmp_path)) == 2


def test_a_resumed_run_drops_what_came_after(tmp_path: Path) -> None:
    write(tmp_path, 1, 100, 200)
    write(tmp_path, 150, resume_step=100)
    assert sorted({row["step"] for row in read_figures(tmp_path)}) == [1, 100, 150]
    assert {row["step"] for row in read_lowest(tmp_path)} == {150}
    write(tmp_path, 7)
    assert {row["step"] for row in read_figures(tmp_path)} == {7}


def test_what_is_not_there(tmp_path: Path) -> None:
    for read in (read_figures, read_lowest):
        with pytest.raises(UserError, match=r"weights holds no weight records; train with records\.every"):
            read(tmp_path)
        with pytest.raises(UserError, match="nowhere does not exist; give the directory of a run"):
            read(tmp_path / "nowhere")
    write(tmp_path, 1, 100)
    with pytest.raises(UserError, match="step 70 was not recorded; the nearest that was is 100"):
        read_lowest(tmp_path, 70)


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "weights/figures_00000001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"figures_00000001\.parquet cannot be read: .*; remove it"):
        read_figures(tmp_path)


def test_columns_that_are_missing_are_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the columns are"):
        WeightRecords(tmp_path).write(1, [{"direction": "image_to_text"}], [])


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("in the way")
    with pytest.raises(UserError, match=r"lowest_00000001\.parquet cannot be written: .*records\.every=0"):
        write(tmp_path, 1)


def test_a_full_disk(tmp_path: Path) -> None:
    """On a file system of 8 kB, made in a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size=8k none {tmp_path}"
    unshare = ["unshare", "--map-root-user", "--mount", "bash", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    code = f"import test_weight_records as t, pathlib; t.write(pathlib.Path({str(tmp_path)!r}), *range(20))"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [*unshare, f"{mount} && exec {sys.executable} -c {code!r}"], env=env, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "parquet cannot be written: the disk is full; put that right, or train with records.every=0" in last
