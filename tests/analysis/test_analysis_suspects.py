"""Suspects of a whole set, against one dense matrix; groups, and the loader that reads them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from commands import analyse
from made_pairs import columns, made_pairs
from pyarrow import csv, parquet
from saved import saved_run
from sources import samples_of
from tars import collator, write_tars

from sacl_ds.analysis.suspects import connected, least_weights, repeats, spread, tile_count
from sacl_ds.data.grouping import Grouping
from sacl_ds.data.order import Place
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation


def dense_rows(pairs, regulation: Regulation) -> list[tuple]:  # type: ignore[no-untyped-def]
    """(smaller weight, image, text, weight by image, weight by text, cosine, the teacher's) of all negatives."""
    x = {name: value.astype(np.float64) for name, value in columns(pairs).items() if name != "ids"}
    ids = pairs.pair_ids
    negative = ~(ids[:, None] == ids[None]).any(-1)
    c, t = x["image"] @ x["text"].T, x["teacher_image"] @ x["teacher_text"].T
    a = regulation.alpha
    inverse = negative / (a * np.exp(regulation.teacher_sharpness * t) + (1 - a) * np.exp(regulation.sharpness * c))
    by_image = inverse * (negative.sum(1) / inverse.sum(1))[:, None]
    by_text = inverse * (negative.sum(0) / inverse.sum(0))[None]
    least = np.minimum(by_image, by_text)
    return [
        (least[i, j], i, j, by_image[i, j], by_text[i, j], c[i, j], t[i, j]) for i, j in np.argwhere(negative).tolist()
    ]


@pytest.mark.parametrize("tile", [16, 1000])
@pytest.mark.parametrize(
    "regulation", [Regulation(0.3, 6.0, 9.0), Regulation(1.0, 0.0, 100.0), Regulation(0.0, 5.0, 1.0)]
)
def test_least_weights_equal_the_dense_matrix(regulation: Regulation, tile: int) -> None:
    pairs = made_pairs(70)
    seen: list[int] = []
    found = least_weights(pairs, regulation, 0.4, 60, tile=tile, done=seen.append)
    expected = sorted(row for row in dense_rows(pairs, regulation) if row[0] < 0.4)
    assert found.chosen == len(expected) > 60
    assert found.pairs == 70 * 69 - 4
    assert len(found.image) == 60
    assert sum(seen) == tile_count(70, tile)
    if regulation.alpha < 1:  # else far down in the tail of 1/s, where float32 orders neighbours otherwise
        assert list(zip(found.image, found.text, strict=True)) == [(row[1], row[2]) for row in expected[:60]]
    for place, name in (
        (0, "weight"),
        (3, "weight_image"),
        (4, "weight_text"),
        (5, "similarity"),
        (6, "teacher_similarity"),
    ):
        values = {(row[1], row[2]): row[place] for row in expected}
        of_pairs = [values[pair] for pair in zip(found.image.tolist(), found.text.tolist(), strict=True)]
        np.testing.assert_allclose(getattr(found, name), of_pairs, rtol=2e-4, atol=1e-6)
    every = least_weights(pairs, regulation, 0.4, 10**6, tile=tile)
    assert len(every.image) == found.chosen


@pytest.mark.parametrize("teacher", [True, False])
def test_most_similar(teacher: bool) -> None:
    pairs = made_pairs(70)
    expected = sorted(
        (-row[6 if teacher else 5], row[1], row[2]) for row in dense_rows(pairs, Regulation(0.3, 6.0, 9.0))
    )
    if not teacher:
        pairs = replace(pairs, teacher_image=None, teacher_text=None)
    found = least_weights(pairs, Regulation(0.0, 6.0, 9.0), 0.3, 25, by_similarity=True, tile=32)
    assert found.chosen == sum(-value > 0.3 for value, _, _ in expected)
    assert list(zip(found.image, found.text, strict=True)) == [(i, j) for _, i, j in expected[:25]]
    assert np.isnan(found.teacher_similarity).all() == (not teacher)
    with pytest.raises(UserError, match="range of numbers"):
        least_weights(pairs, Regulation(0.0, 700.0, 9.0), 0.3, 25)


def test_groups_are_components_and_none_is_a_giant() -> None:
    g = np.random.default_rng(0)
    links = g.integers(0, 60, (35, 2))
    found = connected(60, links, 60)
    reach = np.eye(60, dtype=bool)
    reach[links[:, 0], links[:, 1]] = reach[links[:, 1], links[:, 0]] = True
    for _ in range(7):
        reach = (reach.astype(int) @ reach) > 0
    assert np.array_equal(
        (found.of[:, None] == found.of[None]) & (found.of >= 0)[:, None], reach & (reach.sum(1) > 1)[:, None]
    )
    sizes = sorted((int(reach[first].sum()) for first in {int(row.argmax()) for row in reach}), reverse=True)
    assert found.sizes == [size for size in sizes if size > 1]
    assert (found.refused, found.largest_uncapped) == (0, sizes[0])
    chain = np.stack([np.arange(59), np.arange(1, 60)], 1)
    capped = connected(60, chain, 10)
    assert capped.sizes == [10] * 6
    assert (capped.refused, capped.largest_uncapped) == (5, 60)
    assert repeats(["a", "b", "", "a", "", "b", "a"]).tolist() == [[0, 3], [1, 5], [0, 6]]
    assert spread([5, 3, 3, 2]) == "4 groups of 13 samples: 1 of 2, 2 of 3, 1 of 5"
    assert spread([]) == "no groups"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = made_pairs(70)
    pairs.save(tmp_path / "f")
    settings = ["--alpha", "0.3", "--sharpness", "6", "--teacher-sharpness", "9"]
    files = ["--out", tmp_path / "s.parquet", "--grouping", tmp_path / "g.parquet", "--largest-group", "4"]
    analyse("suspects", tmp_path / "f", *settings, "--weight-under", "0.4", "--top", "50", *files)
    said = capsys.readouterr().out
    expected = sorted(row for row in dense_rows(pairs, Regulation(0.3, 6.0, 9.0)) if row[0] < 0.4)
    assert f"{len(expected)} of {70 * 69 - 4} pairs of an image and another's caption have a weight under 0.4" in said
    assert "the 50 most suspected of them are listed" in said
    table = parquet.read_table(tmp_path / "s.parquet")
    rows = table.to_pylist()
    assert [row["kind"] for row in rows] == ["low weight"] * 50 + ["same image", "same caption"]
    for row, (weight, i, j, *_) in zip(rows, expected[:50], strict=False):
        assert (row["key"], row["other_key"]) == (pairs.keys[i], pairs.keys[j])
        assert (row["shard"], row["url"], row["sha256"]) == (pairs.shards[i], pairs.urls[i], pairs.sha256[i])
        assert (row["caption"], row["other_caption"]) == (pairs.captions[i], pairs.captions[j])
        assert row["weight"] == pytest.approx(weight, rel=1e-4)
    assert (rows[50]["key"], rows[50]["other_key"], rows[50]["weight"]) == ("000002", "000007", None)
    assert (rows[51]["key"], rows[51]["other_key"]) == ("000004", "000009")
    # joined with img2dataset's metadata by its columns
    meta = arrow.table({"key": pairs.keys, "width": list(range(70))})
    joined = table.select(["key", "weight"]).join(meta, "key").to_pylist()
    assert {(row["key"], row["width"]) for row in joined} == {(row["key"], int(row["key"])) for row in rows}

    groups = parquet.read_table(tmp_path / "g.parquet").to_pylist()
    of = {(row["shard"], row["key"]): row["group"] for row in groups}
    sizes = np.unique(list(of.values()), return_counts=True)[1]
    assert sizes.max() <= 4
    assert sizes.min() >= 2
    assert "warning: with all links the largest group would hold" in said
    for row in rows[:50]:
        first, second = of.get((row["shard"], row["key"])), of.get((row["other_shard"], row["other_key"]))
        assert row["group"] == (first if first == second else None)
    grouping = Grouping.load(tmp_path / "g.parquet")
    one, other = (next(name for name in of if of[name] == number) for number in (0, 1))
    mate = next(name for name in of if of[name] == 0 and name != one)
    assert grouping.id_of(*one) == grouping.id_of(*mate) != grouping.id_of(*other)

    analyse("suspects", tmp_path / "f", *settings, "--similarity-above", "0.6", "--out", tmp_path / "s.csv")
    again = csv.read_csv(tmp_path / "s.csv").to_pylist()
    low = [row for row in again if row["kind"] == "low weight"]
    similar = {(row[1], row[2]) for row in expected + dense_rows(pairs, Regulation(0.3, 6.0, 9.0)) if row[6] > 0.6}
    assert {(int(row["key"]), int(row["other_key"])) for row in low} == similar


def test_a_run_and_the_loader_that_reads_its_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved_run(tmp_path / "run", 3, sharpness=4.0)
    (tmp_path / "shards").mkdir()
    pattern = write_tars(tmp_path / "shards", [10, 14])
    files = ["--out", tmp_path / "s.parquet", "--grouping", tmp_path / "g.parquet"]
    analyse("suspects", run, "--shards", pattern, "--similarity-above", "-1", "--top", "6", *files)
    assert f"train with data.grouping={tmp_path / 'g.parquet'}" in capsys.readouterr().out
    of = {row["key"]: row["group"] for row in parquet.read_table(tmp_path / "g.parquet").to_pylist()}
    assert of
    collate = replace(collator(), duplicates="none", grouping=Grouping.load(tmp_path / "g.parquet"))
    samples = samples_of(ShardSource(index_shards(pattern)))
    batch = collate([collate.item(sample, Place(0, 0, 0)) for sample in samples])
    assert len(batch) == 24
    shared = (batch.pair_ids[:, None] == batch.pair_ids[None]).any(-1)
    for i, key in enumerate(batch.keys):
        for j, other in enumerate(batch.keys):
            together = key == other or (key in of and of.get(other) == of[key])
            assert bool(shared[i, j]) == together, (key, other)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--out", "s.txt"], "--out s.txt: its name ends in .parquet or .csv"),
        (["--out", "s.csv", "--grouping", "g.csv"], "--grouping g.csv: its name ends in .parquet"),
        (["--out", "s.csv", "--top", "0"], "--top is at least 1"),
        (["--out", "s.csv", "--alpha", "0", "--sharpness", "0"], "all negatives weigh the same"),
    ],
)
def test_mistakes(arguments: list[str], line: str, tmp_path: Path) -> None:
    made_pairs().save(tmp_path / "f")
    with pytest.raises(UserError) as error:
        analyse("suspects", tmp_path / "f", *arguments)
    assert line in str(error.value)
