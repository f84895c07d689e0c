"""Where two models disagree: against plain numpy and scipy, and the command as a user runs it."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sources
from PIL import Image
from pyarrow import parquet
from saved import saved_run
from scipy import stats

from sacl_ds.analysis.commands import add_parsers
from sacl_ds.analysis.compare import Disagreement
from sacl_ds.analysis.pairs import Pairs, mini_batch
from sacl_ds.analysis.subject import data_source, load_subject, read_pairs
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.losses.distribution import EDGES

DIRECTIONS = ("image_to_text", "text_to_image")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pairs_of(n: int, seed: int, teacher: bool = True) -> Pairs:
    """Random pairs; two of them share their first id, two their second. Ids and names are the same for every seed."""
    rng = np.random.default_rng(seed)
    sides = [unit(rng.normal(size=(n, d)) + 0.4) for d in (8, 8, 5, 5)]
    ids = np.arange(2 * n).reshape(n, 2)
    ids[3, 0], ids[5, 1] = ids[1, 0], ids[2, 1]
    names = [f"{i}" for i in range(n)]
    return Pairs(
        [f"key{i}" for i in names], [f"{int(i) % 3}.tar" for i in names], [f"caption {i}" for i in names],
        sides[0], sides[1], sides[2] if teacher else None, sides[3] if teacher else None, ids, 14.0,
    )  # fmt: skip


def plain_weights(pairs: Pairs, regulation: Regulation, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) weights and negatives as the paper's equations read, one anchor at a time."""
    n = len(pairs)
    weights, negatives = np.zeros((n, n)), np.zeros((n, n), bool)
    for i in range(n):
        for j in range(n):
            negatives[i, j] = i != j and not (pairs.pair_ids[i] == pairs.pair_ids[j]).any()
        similarity = np.zeros(n)
        for j in range(n):
            image, text = (i, j) if direction == "image_to_text" else (j, i)
            student = pairs.image[image].astype(float) @ pairs.text[text].astype(float)
            similarity[j] = np.exp(regulation.sharpness * student) * (1 - regulation.alpha)
            if pairs.teacher_image is not None:
                teacher = pairs.teacher_image[image].astype(float) @ pairs.teacher_text[text].astype(float)
                similarity[j] += np.exp(regulation.teacher_sharpness * teacher) * regulation.alpha
        own = negatives[i]
        weights[i, own] = own.sum() / similarity[own] / (1 / similarity[own]).sum()
    if regulation.drop_below is not None:
        weights = np.where(negatives & (weights >= regulation.drop_below), 1.0, 0.0)
    return weights * regulation.negative_mass, negatives


@pytest.mark.parametrize(
    "regulation",
    [
        Regulation(alpha=0.4, sharpness=3.0, teacher_sharpness=5.0),
        Regulation(alpha=0.0, sharpness=40.0, negative_mass=0.3),
        Regulation(alpha=1.0, teacher_sharpness=6.0, drop_below=0.7),
        Regulation(sharpness=0.0),
    ],
)
def test_a_mini_batch(regulation: Regulation) -> None:
    pairs = pairs_of(17, 3)
    batch = mini_batch(pairs, regulation)
    for direction in DIRECTIONS:
        weights, negatives = plain_weights(pairs, regulation, direction)
        np.testing.assert_allclose(batch.weights(direction), weights, rtol=1e-6)
        np.testing.assert_array_equal(batch.negatives, negatives)
    np.testing.assert_allclose(batch.student, pairs.image @ pairs.text.T, atol=1e-6)


def test_without_teacher_alpha_counts_as_nothing() -> None:
    pairs = pairs_of(9, 1, teacher=False)
    with_alpha, without = (mini_batch(pairs, Regulation(alpha=alpha, sharpness=4.0)) for alpha in (0.7, 0.0))
    np.testing.assert_array_equal(with_alpha.image_to_text, without.image_to_text)
    assert with_alpha.teacher is None


def test_disagreement() -> None:
    """Two mini-batches, by plain numpy and scipy."""
    regulations = Regulation(sharpness=6.0), Regulation(alpha=0.5, sharpness=3.0, teacher_sharpness=4.0)
    batches = [(pairs_of(15, seed), pairs_of(15, seed + 10)) for seed in (1, 2)]
    found = Disagreement(top=7)
    for number, sides in enumerate(batches):
        found.add(sides, regulations, number)

    every, pooled, by_anchor = [], [], []
    for number, sides in enumerate(batches):
        for direction in DIRECTIONS:
            (a, negatives), (b, _) = (plain_weights(s, r, direction) for s, r in zip(sides, regulations, strict=True))
            pooled.append(stats.spearmanr(a[negatives], b[negatives]).statistic)
            for i in range(15):
                by_anchor.append(stats.spearmanr(a[i, negatives[i]], b[i, negatives[i]]).statistic)
                every += [(a[i, j], b[i, j], direction, number, i, j) for j in range(15) if negatives[i, j]]
    a, b = np.array([e[0] for e in every]), np.array([e[1] for e in every])
    ratio = np.log(a / b)
    assert found.pairs == len(every) == 2 * 2 * (15 * 14 - 4)
    assert found.correlation == pytest.approx(np.mean(pooled), abs=1e-9)
    assert found.within_anchors == pytest.approx(np.mean(by_anchor), abs=1e-9)
    assert found.mean_log_ratio == pytest.approx(np.abs(ratio).mean(), rel=1e-6)
    edges = np.append(EDGES[:-1], 1e9)
    np.testing.assert_array_equal(found.histogram, np.histogram2d(a, b, [edges, edges])[0])
    assert [e["log_ratio"] for e in found.largest] == pytest.approx(
        ratio[np.argsort(-np.abs(ratio), kind="stable")[:7]], rel=1e-5
    )
    for entry in found.largest:
        (match,) = [e for e in every if e[2] == entry["direction"] and e[3] == entry["mini_batch"]
                    and f"key{e[4]}" == entry["anchor_key"] and f"key{e[5]}" == entry["negative_key"]]  # fmt: skip
        assert (entry["weight_a"], entry["weight_b"]) == pytest.approx(match[:2], rel=1e-6)
        assert entry["negative_caption"] == f"caption {match[5]}"
        image, text = match[4:] if entry["direction"] == "image_to_text" else (match[5], match[4])
        sides = batches[entry["mini_batch"]]
        cosines = [float(side.image[image] @ side.text[text]) for side in sides]
        assert (entry["similarity_a"], entry["similarity_b"]) == pytest.approx(cosines, abs=1e-6)


def test_removed_negatives_have_a_finite_ratio() -> None:
    pairs = pairs_of(12, 5)
    found = Disagreement(top=3)
    found.add((pairs, pairs), (Regulation(sharpness=5.0, drop_below=1.0), Regulation(sharpness=5.0)), 0)
    assert all(np.isfinite(entry["log_ratio"]) for entry in found.largest)
    assert found.largest[0]["weight_a"] == 0
    assert found.largest[0]["log_ratio"] == pytest.approx(np.log(1e-4 / found.largest[0]["weight_b"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("compared")
    return saved_run(base / "one", 1, sharpness=4.0), saved_run(base / "two", 2, sharpness=2.0, teacher=False)


def compare(*arguments: str | Path) -> None:
    """As tools/weight_analysis.py would, without the seconds in which a new process imports everything."""
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    options = parser.parse_args(["compare", *map(str, arguments)])
    options.act(options)


def test_the_command(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compared"
    compare(*runs, "--out", out, "--top", "12", "--seed", "3")
    printed = capsys.readouterr().out
    assert "2 mini-batches of 16 pairs" in printed
    figures = json.loads((out / "disagreement.json").read_text())
    assert (figures["a"], figures["b"], figures["mini_batches"]) == ("one", "two", 2)
    assert figures["regulation_a"] | {"alpha": 0.5} == figures["regulation_a"]
    assert figures["regulation_b"]["alpha"] == 0.0

    subjects = [load_subject(run) for run in runs]
    source = data_source(subjects[0].run, None)
    sides = [read_pairs(subject, source, 40) for subject in subjects]
    settings = Regulation(alpha=0.5, sharpness=4.0, teacher_sharpness=4.0), Regulation(sharpness=2.0)
    order = np.random.default_rng(3).permutation(40)
    ratios = []
    for start in (0, 16):
        part = [side.take(order[start : start + 16]) for side in sides]
        for direction in DIRECTIONS:
            (a, negatives), (b, _) = (plain_weights(p, r, direction) for p, r in zip(part, settings, strict=True))
            ratios.append(np.log(a[negatives] / b[negatives]))
    every = np.concatenate(ratios)
    assert figures["pairs"] == len(every) == np.sum(figures["histogram"])
    assert figures["mean_absolute_log_ratio"] == pytest.approx(np.abs(every).mean(), rel=1e-4)

    rows = parquet.read_table(out / "disagreement.parquet").to_pylist()
    assert rows == figures["largest"]
    assert len(rows) == 12
    assert [abs(row["log_ratio"]) for row in rows] == pytest.approx(np.sort(np.abs(every))[::-1][:12], rel=1e-4)
    captions = dict(zip(sides[0].keys, sides[0].captions, strict=True))
    assert all(captions[row["anchor_key"]] == row["anchor_caption"] for row in rows)
    assert rows[0]["anchor_caption"][:20] in printed
    with Image.open(out / "weights.png") as picture:
        assert picture.format == "PNG"


def test_a_run_against_its_teacher(runs: tuple[Path, Path], tmp_path: Path) -> None:
    compare(runs[0], "teacher", "--out", tmp_path, "--batch-size", "40")
    figures = json.loads((tmp_path / "disagreement.json").read_text())
    assert (figures["regulation_a"]["alpha"], figures["regulation_b"]["alpha"]) == (0.0, 1.0)
    subject = load_subject(runs[0])
    pairs = read_pairs(subject, data_source(subject.run, None), 40)
    teachers = []
    for direction in DIRECTIONS:
        (a, negatives), (b, _) = (
            plain_weights(pairs, regulation, direction)
            for regulation in (Regulation(sharpness=4.0), Regulation(alpha=1.0, teacher_sharpness=4.0))
        )
        teachers.append(stats.spearmanr(a[negatives], b[negatives]).statistic)
    assert figures["rank_correlation"] == pytest.approx(np.mean(teachers), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("B", "teacher"), "has no teacher"),
        (("A", "nowhere"), "nowhere"),
        (("A", "B", "--top", "0"), "--top 0: at least 1"),
        (("A", "B", "--batch-size", "1"), "--batch-size 1: at least two"),
        (("A", "B", "--device", "abacus"), "--device abacus"),
    ],
)
def test_mistakes(runs: tuple[Path, Path], tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    named = {"A": runs[0], "B": runs[1]}
    words = [named.get(word, word) for word in arguments]
    with pytest.raises(UserError, match=said) as caught:
        compare(*words, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_help_is_light() -> None:
    code = (
        "import sys, sacl_ds.analysis.commands;"
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'pyarrow', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for name in ("report", "compare"):
        shown = sources.run("weight_analysis", name, "--help", COLUMNS="80")
        assert shown.returncode == 0
        assert shown.stdout.count("example:") == 1
