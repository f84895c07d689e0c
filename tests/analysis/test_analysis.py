"""What is looked at, scans of weights, and calibration: against dense matrices in plain numpy."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sources
import torch
from commands import analyse
from dense_weights import dense
from hypothesis import given, settings
from hypothesis import strategies as st
from made_pairs import columns, made_pairs
from PIL import Image
from pyarrow import parquet
from saved import saved_run
from tars import jpeg, write_tar

from sacl_ds.analysis.calibrate import calibrated, share_under, sharpness_for
from sacl_ds.analysis.inputs import labels, per_cent
from sacl_ds.analysis.scan import DIRECTIONS, mini_batches, scan
from sacl_ds.analysis.subject import Pairs, data_source, load_subject, pictures, read_pairs, regulation_of
from sacl_ds.data.pictures import Picture
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.losses.distribution import EDGES
from sacl_ds.training.false_share import falling_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run") / "run", 3, sharpness=4.0, alpha_end=0.25)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards: metadata of img2dataset, several captions, a damaged image, a repeated one."""
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for number in range(12):
        meta = {"captions": [f"a red thing {number}", "more"], "url": f"http://x/{number}", "sha256": f"{number:064x}"}
        if number == 4:
            meta = {"captions": ["A red thing: 3!"]}
        samples.append((f"{number:05d}", {"jpg": jpeg(30 * number, (60, 40)), "json": json.dumps(meta).encode()}))
    samples[6][1]["jpg"] = samples[6][1]["jpg"][:-40]
    samples[8][1]["jpg"] = samples[1][1]["jpg"]
    write_tar(folder / "0.tar", samples[:7])
    write_tar(folder / "1.tar", samples[7:])
    return str(folder / "{0..1}.tar")


def test_pairs_from_shards(run: Path, shards: str) -> None:
    """Features equal those of the model on each sample by itself; what cannot be used is counted."""
    subject = load_subject(run)
    assert (subject.step, subject.name, subject.folder) == (10, str(run), run)
    assert not subject.model.training
    seen: list[int] = []
    source = data_source(subject.run, shards)
    pairs = read_pairs(subject, source, None, batch_size=5, progress=seen.append)
    assert sum(seen) == 12
    assert pairs.skipped == 1
    assert pairs.keys == [f"{n:05d}" for n in range(12) if n != 6]
    assert [Path(shard).name for shard in pairs.shards] == ["0.tar"] * 6 + ["1.tar"] * 5
    assert pairs.captions[3:5] == ["a red thing 3", "A red thing: 3!"]
    assert pairs.urls[:5] == ["http://x/0", "http://x/1", "http://x/2", "http://x/3", ""]
    assert pairs.sha256[3] == f"{3:064x}"
    assert pairs.sha256[4] == hashlib.sha256(jpeg(120, (60, 40))).hexdigest()
    same = [(pairs.pair_ids[:, None] == pairs.pair_ids[None])[:, :, column] for column in range(2)]
    one, other = pairs.keys.index("00001"), pairs.keys.index("00008")
    assert sorted(map(tuple, np.argwhere(np.triu(same[0], 1)).tolist())) == [(one, other)]
    assert sorted(map(tuple, np.argwhere(np.triu(same[1], 1)).tolist())) == [(3, 4)]
    assert subject.teacher is not None
    look = CanonicalView(subject.run.model.image_size)
    for row in (0, 4, 10):
        number = int(pairs.keys[row])
        pixels = look(Picture(jpeg(30 * number if number != 8 else 30, (60, 40))), ())[None]
        rows = torch.tensor(subject.tokenizer.ids([pairs.captions[row]]))
        with torch.no_grad():
            image, text = (
                subject.model.encode_image(pixels)[1],
                subject.model.encode_text(rows, rows.new_ones(rows.shape))[1],
            )
        for found, expected in (
            (pairs.image, image), (pairs.text, text), (pairs.teacher_image, subject.teacher.image_features(pixels)),
        ):  # fmt: skip
            assert found is not None
            np.testing.assert_allclose(found[row], expected[0].numpy(), atol=1e-5)
    shown = pictures(source, [(pairs.shards[0], "00000"), (pairs.shards[9], "00010"), ("nowhere.tar", "00000")])
    assert list(shown) == [(pairs.shards[0], "00000"), (pairs.shards[9], "00010")]
    assert all(isinstance(each, Image.Image) and each.size == (60, 40) for each in shown.values())
    assert len(read_pairs(load_subject(run, "none"), source, 3)) == 3


def test_held_out_data_and_teachers(run: Path, tmp_path: Path) -> None:
    subject = load_subject(run)
    pairs = read_pairs(subject, data_source(subject.run, None), None)
    assert len(pairs) == 40
    assert pairs.keys[0].startswith("1001")
    assert load_subject(run, "none").teacher is None
    assert subject.teacher is not None
    other = load_subject(run, str(run))
    assert other.teacher is not None
    assert other.teacher.identity != subject.teacher.identity
    assert regulation_of(subject.run) == Regulation(0.25, 4.0, 4.0)
    assert regulation_of(subject.run, 0.5, 2.0, 3.0) == Regulation(0.5, 2.0, 3.0)
    plain = saved_run(tmp_path / "plain", 1, teacher=False, contrastive="infonce")
    assert regulation_of(load_subject(plain).run).even
    with pytest.raises(UserError, match="alpha=2"):
        regulation_of(subject.run, 2.0)
    shards_run = subject.run.model_copy(update={"data": subject.run.data.model_copy(update={"source": "shards"})})
    with pytest.raises(UserError, match="no held-out data"):
        data_source(shards_run, None)


def test_features_are_kept(tmp_path: Path) -> None:
    pairs = made_pairs()
    pairs.save(tmp_path / "f")
    again = Pairs.load(tmp_path / "f")
    assert isinstance(again.image, np.memmap)
    for name, value in vars(pairs).items():
        assert np.array_equal(value, getattr(again, name)), name
    some = again.take([5, 1])
    assert (some.keys, some.urls) == (["000005", "000001"], ["http://x/5.jpg", "http://x/1.jpg"])
    assert np.array_equal(some.text, pairs.text[[5, 1]])
    alone = replace(pairs, teacher_image=None, teacher_text=None, urls=[])
    alone.save(tmp_path / "g")
    again = Pairs.load(tmp_path / "g")
    assert again.teacher is None
    assert again.urls == [""] * 50
    (tmp_path / "g/samples.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"samples\.parquet: its checksum is not that of its manifest"):
        Pairs.load(tmp_path / "g")
    (tmp_path / "g/checksums.json").unlink()
    with pytest.raises(UserError, match="no features that can be read"):
        Pairs.load(tmp_path / "g")
    replace(pairs, image=pairs.image[:-1]).save(tmp_path / "h")
    with pytest.raises(UserError, match="not 50 rows everywhere"):
        Pairs.load(tmp_path / "h")


def test_mini_batches_without_replacement() -> None:
    drawn = list(mini_batches(23, 11, 5, seed=1))
    assert [len(rows) for rows in drawn] == [5] * 11
    for epoch in range(0, 8, 4):
        assert len(set(np.concatenate(drawn[epoch : epoch + 4]).tolist())) == 20
    again = list(mini_batches(23, 11, 5, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not np.array_equal(drawn[0], drawn[4])
    assert not np.array_equal(drawn[0], next(mini_batches(23, 1, 5, seed=2)))


@pytest.mark.parametrize("regulation", [Regulation(0.3, 6.0, 9.0), Regulation(0.0, 12.0, 1.0, 0.5, 0.6)])
def test_scan_equals_dense_weights(regulation: Regulation) -> None:
    pairs = made_pairs()
    found = scan(pairs, regulation, 7, 16, seed=4)
    expected: list[list[dict]] = []
    for rows in mini_batches(50, 7, 16, 4):
        expected.append(dense(columns(pairs.take(np.sort(rows))), regulation, pairs.logit_scale, 0))
    for number, direction in enumerate(DIRECTIONS):
        parts = [each[number] for each in expected]
        figures = found[direction].figures()
        weights = np.concatenate([part["weights"] for part in parts])
        assert figures["pairs"] == len(weights)
        assert figures["anchors"] == 7 * 16
        assert figures["histogram"] == np.histogram(weights, EDGES)[0].tolist()
        assert figures["under"] == pytest.approx([(weights < t / 10).mean() for t in range(1, 10)], abs=1e-12)
        for name in ("effective", "effective_share", "mass", "shape"):
            assert figures[name] == pytest.approx(np.mean([part[name] for part in parts]), rel=1e-5), name
        upper = np.quantile(weights, 0.9, method="inverted_cdf")
        assert figures["quantiles"][7] == pytest.approx(upper, rel=0.13)  # a bin is a factor of 1.12 wide


def test_scan_side_by_side(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_pairs().save(tmp_path / "features")
    options = ["--batches", "6", "--batch-size", "10", "--seed", "2", "--out", tmp_path / "out", "--sharpness", "8"]
    analyse("scan", run, tmp_path / "features", *options)
    said = capsys.readouterr().out
    assert "run: 40 pairs, 6 mini-batches of 10, α 0.25, κ 8, κ_t 8" in said
    assert "features: 50 pairs" in said
    written = json.loads((tmp_path / "out/scan.json").read_text())
    assert [subject["label"] for subject in written["subjects"]] == ["run", "features"]
    assert written["subjects"][0]["step"] == 10
    pairs = Pairs.load(tmp_path / "features")
    expected = scan(pairs, Regulation(1.0, 8.0, 8.0), 6, 10, 2)  # what a run has that says nothing else
    for direction, found in expected.items():
        assert written["subjects"][1]["directions"][direction] == json.loads(json.dumps(found.figures()))
        assert sum(found.histogram) == found.pairs
    rows = parquet.read_table(tmp_path / "out/scan.parquet").to_pylist()
    assert [(row["label"], row["direction"]) for row in rows] == [
        (n, d) for n in ("run", "features") for d in DIRECTIONS
    ]
    assert rows[3]["histogram"] == written["subjects"][1]["directions"]["text_to_image"]["histogram"]
    assert Image.open(tmp_path / "out/scan.png").size[0] > 800
    with pytest.raises(UserError, match="one run at a time"):
        analyse("scan", run, run, "--save-features", tmp_path / "x")


def test_saved_features_scan_like_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batches", "3", "--batch-size", "12"]
    analyse("scan", run, *options, "--save-features", tmp_path / "f", "--out", tmp_path / "a")
    analyse("scan", tmp_path / "f", *options, "--out", tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "scan.json").read_text())["subjects"][0] for name in "ab")
    assert a["directions"] == b["directions"]
    assert a["regulation"] == b["regulation"]
    analyse("scan", run, "--batch-size", "64", "--out", tmp_path / "c", "--teacher", "none")
    assert "all 40 pairs are one mini-batch" in capsys.readouterr().out
    whole = json.loads((tmp_path / "c/scan.json").read_text())["subjects"][0]
    assert (whole["batches"], whole["regulation"]["alpha"]) == (1, 0.0)


def share_at(pairs: Pairs, rows: list[np.ndarray], kappa: float, under: float, teacher: bool) -> float:
    """Of the weights at this sharpness of one similarity alone, from dense matrices."""
    regulation = Regulation(1.0, 0.0, kappa) if teacher else Regulation(0.0, kappa, 0.0)
    found = [dense(columns(pairs.take(each)), regulation, pairs.logit_scale, 0) for each in rows]
    return float((np.concatenate([part["weights"] for both in found for part in both]) < under).mean())


@pytest.mark.parametrize(("share", "under"), [(0.2, 0.7), (0.05, 0.3)])
def test_calibrated_sharpness_gives_the_share(
    share: float, under: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = made_pairs(400)
    pairs.save(tmp_path / "f")
    drawing = ["--batches", "4", "--batch-size", "100", "--seed", "3", "--out", tmp_path]
    analyse("calibrate", tmp_path / "f", "--share", str(share), "--under", str(under), *drawing)
    found = json.loads((tmp_path / "calibration.json").read_text())
    rows = list(mini_batches(400, 4, 100, 3))
    said = capsys.readouterr().out
    for name in ("model", "teacher"):
        kappa = found[name]["sharpness"]
        assert share_at(pairs, rows, kappa, under, name == "teacher") == pytest.approx(share, abs=2e-4)
        assert share_at(pairs, rows, 0.98 * kappa, under, name == "teacher") < share
        assert f"{kappa:.3g}" in said
    assert f"settings: loss.sharpness={found['model']['sharpness']:.3g} loss.teacher_sharpness=" in said
    assert Image.open(tmp_path / "calibration.png").format == "PNG"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.05, 1.0), st.floats(0.02, 0.95))
def test_the_share_never_falls_with_the_sharpness(seed: int, under: float, share: float) -> None:
    """Which is why the smallest sharpness is found by halving."""
    g = np.random.default_rng(seed)
    cosines, apart = g.uniform(-1, 1, (9, 9)) ** g.integers(1, 6), g.random((9, 9)) < 0.8
    np.fill_diagonal(apart, False)
    apart[0, 1] = True
    found = calibrated([cosines], [apart], share, under)
    assert (np.diff(found.shares) >= 0).all()
    if found.sharpness is None:
        assert found.shares[-1] < share
        assert np.isnan(sharpness_for(cosines, apart, share, under))
    else:
        assert sharpness_for(cosines, apart, share, under) == found.sharpness
        assert share_under([cosines], [apart], found.sharpness, under) >= share
        assert share_under([cosines], [apart], 0.999 * found.sharpness, under) < share


def test_a_share_that_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal cosines: no sharpness makes weights differ."""
    flat = made_pairs()
    one = np.repeat(flat.image[:1], 50, 0)
    replace(flat, image=one, text=one).save(tmp_path / "f")
    analyse("calibrate", tmp_path / "f", "--out", tmp_path)
    said = capsys.readouterr().out
    assert "model (α = 0): no sharpness up to 200 brings 20 % of the negatives under 0.7; the most is 0 %" in said
    assert "settings: loss.teacher_sharpness=" in said
    assert json.loads((tmp_path / "calibration.json").read_text())["model"]["sharpness"] is None


def test_weights_that_fall_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = made_pairs(300)
    pairs.save(tmp_path / "f")
    analyse("calibrate", tmp_path / "f", "--false-share", "0.1", "--teacher-sharpness", "30", "--out", tmp_path)
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert pairs.teacher is not None
    cosine = (pairs.teacher[0].astype(np.float64) @ pairs.teacher[1].T)[:300, :300]
    ids = pairs.pair_ids
    negative = ~(ids[:, None] == ids[None]).any(-1)
    c0, alpha = found["cosine"], found["alpha"]
    assert (cosine[negative] > c0).mean() == pytest.approx(0.1, abs=1e-4)
    assert alpha * np.exp(30 * c0) == pytest.approx(1 - alpha)
    weights = dense(columns(pairs), Regulation(alpha, 0.0, 30.0), 20.0, 0)
    every = np.concatenate([part["weights"] for part in weights])
    assert found["under"]["0.5"] == pytest.approx((every < 0.5).mean(), abs=1e-6)
    said = capsys.readouterr().out
    settings = f"loss.sharpness=0 loss.teacher_sharpness=30 loss.alpha_start={alpha:.6g} loss.alpha_end={alpha:.6g}"
    assert f"settings: {settings}" in said
    assert Image.open(tmp_path / "calibration.png").format == "PNG"
    for share, kappa in ((0.5, 3.0), (0.01, 200.0)):
        c0, alpha = falling_weights(cosine, share, kappa)
        assert (cosine > c0).mean() == pytest.approx(share, abs=1e-3)
        assert np.log(alpha) + kappa * c0 == pytest.approx(np.log1p(-alpha))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["scan", "nowhere"], "nowhere: no such directory"),
        (["scan", "{f}", "--batch-size", "1"], "--batch-size at least 2"),
        (["scan", "{f}", "--teacher", "x"], "holds features; give the run"),
        (["scan", "{f}", "--shards", "x.tar"], "--shards: "),
        (["scan", "{f}", "--teacher", "none", "--alpha", "0.5"], "--alpha 0.5 needs a teacher"),
        (["scan", "{f}", "--alpha", "1.5"], "alpha=1.5 must lie in"),
        (["scan", "{run}/teacher/nothing"], "no such directory"),
        (["scan", "{run}", "--device", "moon"], "--device moon"),
        (["scan", "{run}", "--shards", "x.tar"], "--shards: shard x.tar does not exist"),
        (["calibrate", "{f}", "--share", "20"], "--share 20.0: a share lies between 0 and 1"),
        (["calibrate", "{f}", "--under", "2"], "--under 2.0: a weight above 0"),
        (["calibrate", "{f}", "--teacher", "none", "--false-share", "0.1"], "has no teacher"),
        (["calibrate"], "required"),
    ],
)
def test_mistakes(arguments: list[str], line: str, run: Path, tmp_path: Path) -> None:
    made_pairs().save(tmp_path / "f")
    named = [argument.format(f=tmp_path / "f", run=run) for argument in arguments]
    with pytest.raises(UserError) as error:
        analyse(*named, *(["--out", str(tmp_path / "out")] if len(named) > 1 else []))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_names_and_numbers() -> None:
    assert labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert labels(["x/run/step_1", "y/run/step_1"]) == ["x/run/step_1", "y/run/step_1"]
    assert [per_cent(share) for share in (0.2, 0.031, 0.00042, 0.0, 1.0)] == ["20", "3.1", "0.042", "0", "100"]


def test_the_command_line(tmp_path: Path) -> None:
    """As a process: help at once and within 80 columns, one line for a mistake."""
    code = "import sys, sacl_ds.analysis.commands; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    for name in ("scan", "calibrate", "suspects", "detect"):
        done = sources.run("weight_analysis", name, "--help", COLUMNS="80")
        assert done.returncode == 0, done.stderr
        assert all(len(line) <= 80 for line in done.stdout.splitlines()), name
        assert "example:" in done.stdout
        assert "default" in done.stdout
    line = sources.error_of(sources.run("weight_analysis", "scan", tmp_path / "none"))
    assert "give a finished run, RUN/checkpoints/step_N, or saved features" in line
