"""A table of groups is one more column of ids: pairs of one group are no negatives of each other."""

import csv
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from starting import start
from tars import collator, write_tars

from sacl_ds.config import DataConfig
from sacl_ds.data.batch import duplicates
from sacl_ds.data.grouping import Grouping
from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.errors import UserError
from sacl_ds.telemetry.records import read_figures

Table = dict[str, list]


def write_csv(path: Path, table: Table) -> Path:
    path = path.with_suffix(".csv")
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(table), *zip(*table.values(), strict=True)])
    return path


def write_parquet(path: Path, table: Table) -> Path:
    path = path.with_suffix(".parquet")
    parquet.write_table(arrow.table(table), path)
    return path


def excluded(pattern: str, grouping: Grouping | None, workers: int = 0) -> set[tuple[str, str]]:
    """Keys that share an id in a batch of all 24 samples."""
    source = ShardSource(index_shards(pattern), DataConfig(source="shards", shards=pattern))
    order = GlobalOrder(source.sets, 24, 1, 4, 20, None)
    loader = BatchLoader(
        source, order, replace(collator(), duplicates="none", grouping=grouping), rank=0, world=1, workers=workers
    )
    (batch,) = islice(iter(loader), 1)
    assert batch.pair_ids.shape[1] == (1 if grouping is None else 2)
    assert len(set(batch.keys)) == 24
    ids = batch.pair_ids.numpy()
    return {
        (min(batch.keys[i], batch.keys[j]), max(batch.keys[i], batch.keys[j]))
        for i, j in combinations(range(24), 2)
        if (ids[i] == ids[j]).any()
    }


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Samples 000000 to 000011 in 0.tar, 000012 to 000023 in 1.tar."""
    return write_tars(tmp_path_factory.mktemp("tars"), (12, 12))


@pytest.mark.parametrize("write", [write_csv, write_parquet])
@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_of_a_group_are_no_negatives(
    pattern: str, write: Callable[[Path, Table], Path], workers: int, tmp_path: Path
) -> None:
    assert excluded(pattern, None) == set()
    table: Table = {
        "key": ["000003", "000015", "000007", "000020", "000021", "000009", "000001", "999999"],
        "shard": ["/elsewhere/0.tar", "1.tar", "0.tar", "", "http://host/1.tar?token=3", "1.tar", "0.tar", "0.tar"],
        "group": ["7", "7", "8", "8", "8", "7", "", "8"],
        "note": ["x"] * 8,
    }
    # 000009 is of 0.tar; 000001 has no group; 999999 is not in use
    grouping = Grouping.load(write(tmp_path / "groups", table))
    trio = combinations(["000007", "000020", "000021"], 2)
    assert excluded(pattern, grouping, workers) == {("000003", "000015"), *trio}


def test_numbers_as_groups_and_no_shards(pattern: str, tmp_path: Path) -> None:
    table: Table = {"group": [1, 1, 2, None], "key": ["000003", "000004", "000005", "000006"]}
    assert excluded(pattern, Grouping.load(write_parquet(tmp_path / "g", table))) == {("000003", "000004")}


def test_none_in_use_is_no_mistake(pattern: str, tmp_path: Path) -> None:
    for table in ({"key": ["a", "b"], "group": ["1", "1"]}, {"key": [], "group": []}):
        assert excluded(pattern, Grouping.load(write_csv(tmp_path / "g", table))) == set()


def test_what_is_wrong_with_a_grouping(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as error:
            Grouping.load(path)
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix(f"data.grouping={path}").removeprefix(":").strip()

    good: Table = {"key": ["a"], "group": ["1"]}
    assert message(tmp_path / "nowhere.csv").startswith("no such file; correct the path, or make one with tools/")
    other = write_csv(tmp_path / "g", good).rename(tmp_path / "g.txt")
    assert message(other) == "a grouping's name ends in .parquet or .csv"
    for write in (write_csv, write_parquet):
        without = write(tmp_path / "g", {"kye": ["a"], "group": ["1"]})
        assert message(without) == "no column 'key' (did you mean 'kye'?); its columns: kye, group"
        assert message(write(tmp_path / "g", {"key": ["a"]})).startswith("no column 'group'")
        two = write(tmp_path / "g", {"key": ["a", "b", "a"], "group": ["1", "1", "2"], "shard": ["x/0.tar"] * 3})
        assert message(two) == "sample a of shard x/0.tar is in two groups; leave one of them out, or join them"
    (tmp_path / "g.parquet").write_bytes(b"no parquet")
    assert message(tmp_path / "g.parquet").startswith("cannot be read: ")
    (tmp_path / "g.csv").write_bytes(b"key,group\n\xff\xfe,1\n")
    assert message(tmp_path / "g.csv") == "not UTF-8 text; convert it"
    (tmp_path / "g.csv").write_bytes(b'key,group\n"a,1\n')
    assert message(tmp_path / "g.csv").startswith("cannot be read: ")


def test_a_run_with_a_grouping(tmp_path: Path) -> None:
    """All scenes of the first thousand in one group: none of them is left as a negative of another."""
    table: Table = {"key": [f"0001{i:09d}" for i in range(1000)], "group": ["all"] * 1000}
    grouping = write_csv(tmp_path / "groups", table)
    settings = ["data.scenes.count=1000", "teacher.steps=0", "train.steps=2", f"data.grouping={grouping}"]
    start(tmp_path / "run", *settings, ranks=2)
    assert {(row["pairs"], row["duplicates"]) for row in read_figures(tmp_path / "run")} == {(0, 16 * 15 // 2)}


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), max_size=12))
def test_duplicates_counts_pairs_once(columns: int, rows: list[list[int]]) -> None:
    ids = np.array(rows, np.int64).reshape(-1, 4)[:, :columns]
    expected = sum((a == b).any() for a, b in combinations(ids, 2))
    assert duplicates(torch.from_numpy(ids)) == expected
