"""The weight as a detector: against dense matrices, scipy, and the real ECCV Caption."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import analyse
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from saved import saved_run
from scipy.stats import mannwhitneyu, rankdata, spearmanr

from sacl_ds.analysis.detect import detection
from sacl_ds.analysis.ranking import Detector, ranks, spearman
from sacl_ds.analysis.subject import Pairs, data_source, load_subject, read_pairs
from sacl_ds.analysis.truth import questions
from sacl_ds.data.sources import held_out_scenes
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation

SCORES = st.lists(st.integers(-5, 5).map(lambda value: value / 2), min_size=1, max_size=40)


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Its definition, threshold by threshold."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = truth[taken].sum() / truth.sum()
        total += (recall - before) * truth[taken].mean()
        before = recall
    return total


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES, st.integers(1, 4))
def test_curves_equal_their_definitions(found: list[float], others: list[float], pieces: int) -> None:
    positives, negatives = np.array(found), np.array(others)
    detector = Detector(positives)
    for part in np.array_split(negatives, pieces):
        detector.add(part)
    curve = detector.curve()
    scores = np.concatenate([positives, negatives])
    truth = np.concatenate([np.ones(len(positives)), np.zeros(len(negatives))])
    expected = mannwhitneyu(positives, negatives).statistic / (len(positives) * len(negatives))
    assert curve.auc == pytest.approx(expected)
    assert curve.average_precision == pytest.approx(average_precision(scores, truth))
    assert curve.chance == truth.mean()
    for recall, precision, wrong in zip(curve.recall, curve.precision, curve.false_positive, strict=True):
        taken = scores >= np.sort(positives)[::-1][round(recall * len(positives)) - 1]
        assert precision == pytest.approx(truth[taken].mean())
        assert wrong == pytest.approx((taken & (truth == 0)).sum() / len(negatives))
    assert np.array_equal(ranks(scores), rankdata(scores))
    if len(set(scores.tolist())) > 1:
        assert spearman(scores, truth) == pytest.approx(spearmanr(scores, truth).statistic)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run") / "run", 3, count=60, sharpness=4.0, alpha_end=0.25)


def test_on_scenes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analyse("detect", run, "--out", tmp_path / "out")
    written = json.loads((tmp_path / "out/detection.json").read_text())
    assert written["detectors"]["mixture"] == {
        "alpha": 0.25, "sharpness": 4.0, "teacher_sharpness": 4.0, "negative_mass": 1.0, "drop_below": None
    }  # fmt: skip
    subject = load_subject(run)
    pairs = read_pairs(subject, data_source(subject.run, None), None)
    assert pairs.teacher is not None
    scenes = held_out_scenes(subject.run)
    first = scenes.relevance()[:: scenes.captions_per_scene]  # of each scene the first caption, as in `pairs`
    negative = ~(pairs.pair_ids[:, None] == pairs.pair_ids[None]).any(-1)
    c, t = pairs.image.astype(float) @ pairs.text.T, pairs.teacher[0].astype(float) @ pairs.teacher[1].T
    similarities = {
        "model": np.exp(4 * c),
        "teacher": np.exp(4 * t),
        "mixture": 0.25 * np.exp(4 * t) + 0.75 * np.exp(4 * c),
    }
    for name, s in similarities.items():
        for direction in ("image_to_text", "text_to_image"):
            turned = direction == "text_to_image"
            inverse, stays, holds = (x.T if turned else x for x in (negative / s, negative, first.T))
            weights = inverse * (stays.sum(1) / inverse.sum(1))[:, None]
            scores, grades = -np.log(weights[stays]), holds[stays]
            found = written["truths"]["scenes"][direction][name]
            assert (found["negatives"], found["false_negatives"]) == (stays.sum(), (grades == 1).sum())
            assert found["auc"] == pytest.approx(
                mannwhitneyu(scores[grades == 1], scores[grades < 1]).statistic
                / ((grades == 1).sum() * (grades < 1).sum()), abs=1e-4,
            )  # fmt: skip
            assert found["average_precision"] == pytest.approx(average_precision(scores, grades == 1), rel=1e-3)
            assert found["rank_correlation"] == pytest.approx(spearmanr(scores, grades).statistic, abs=1e-4)
            each = [spearmanr(-w[m], r[m]).statistic for w, m, r in zip(weights, stays, holds, strict=True)]
            assert found["rank_correlation_within_anchors"] == pytest.approx(np.mean(each), abs=1e-4)
            for entry in found["at_weight"]:
                low = weights[stays] < entry["under"]
                assert entry["share"] == pytest.approx(low.mean(), abs=1e-3)
                assert entry["recall"] == pytest.approx(low[grades == 1].mean(), abs=5e-3)
    assert Image.open(tmp_path / "out/detection.png").format == "PNG"
    assert "rank corr." in capsys.readouterr().out
    options = ["--save-features", tmp_path / "f", "--scenes", "90", "--out", tmp_path / "more"]
    analyse("detect", run, *options)
    analyse("detect", tmp_path / "f", "--out", tmp_path / "again")
    more, again = (json.loads((tmp_path / name / "detection.json").read_text()) for name in ("more", "again"))
    assert more["truths"] == again["truths"]
    assert more["pairs"] == 90


def test_perfect_weights(run: Path) -> None:
    """A teacher that knows: its cosine rises with the true relevance."""
    subject = load_subject(run, "none")
    pairs = read_pairs(subject, data_source(subject.run, None), None)
    scenes = held_out_scenes(subject.run)
    holds = scenes.relevance()[:: scenes.captions_per_scene]
    knows = Pairs(**{**vars(pairs), "teacher_image": np.eye(60, dtype=np.float32), "teacher_text": holds})
    for question in questions(knows):
        figures, curve = detection(question, Regulation(1.0, 1.0, 5.0))
        if question.direction == "text_to_image":
            continue
        # normalised within an anchor, so that anchors with other negatives may overlap a little
        assert curve.auc > 0.98
        assert figures["rank_correlation_within_anchors"] == pytest.approx(1.0, abs=1e-9)
    strangers = Pairs(**{**vars(pairs), "keys": ["a"] * 60})
    with pytest.raises(UserError, match="the truth is known of"):
        questions(strangers)
    with pytest.raises(UserError, match="another version of the scenes"):
        questions(Pairs(**{**vars(pairs), "captions": ["no"] * 60}))


def coco_features(count: int, seed: int = 0) -> tuple[Pairs, dict[str, Any]]:
    """Random features for the captions of the first images that ECCV Caption asks about, and the package's truth."""
    package = pytest.importorskip("eccv_caption")
    metrics = package.Metrics()
    images = list(metrics.eccv_gts["i2t"])[:count]
    names = [(image, caption) for image in images for caption in metrics.coco_gts["i2t"][image]]
    g = np.random.default_rng(seed)

    def unit(rows: int, width: int) -> np.ndarray:
        x = g.standard_normal((rows, width)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    row = {image: place for place, image in enumerate(images)}
    own = [row[image] for image, _ in names]
    return Pairs(
        [f"{image}-{caption}" for image, caption in names], ["coco:test"] * len(names), ["words"] * len(names),
        unit(count, 8)[own], unit(len(names), 8), unit(count, 6)[own], unit(len(names), 6),
        np.array([[image] for image, _ in names]), 20.0,
    ), {"eccv": metrics.eccv_gts, "cxc": metrics.cxc_gts}  # fmt: skip


def test_on_eccv_caption(tmp_path: Path) -> None:
    pairs, truth = coco_features(150)
    pairs.save(tmp_path / "f")
    settings = ["--alpha", "0.4", "--sharpness", "5", "--teacher-sharpness", "7"]
    analyse("detect", tmp_path / "f", *settings, "--out", tmp_path / "out")
    written = json.loads((tmp_path / "out/detection.json").read_text())["truths"]
    image_of, caption_of = (np.array([int(key.split("-")[part]) for key in pairs.keys]) for part in (0, 1))
    assert pairs.teacher is not None
    images = sorted(set(image_of.tolist()))
    row = {image: int(np.flatnonzero(image_of == image)[0]) for image in images}
    first = [row[image] for image in images]
    c = pairs.image[first].astype(float) @ pairs.text.T
    t = pairs.teacher[0][first].astype(float) @ pairs.teacher[1].T
    inverse = 1 / (0.4 * np.exp(7 * t) + 0.6 * np.exp(5 * c))  # (images, captions)
    negative = np.array(images)[:, None] != image_of[None]
    for name, key in (("ECCV Caption", "eccv"), ("CxC", "cxc")):
        for direction in ("image_to_text", "text_to_image"):
            anchors, others = (
                (images, caption_of.tolist()) if direction == "image_to_text" else (caption_of.tolist(), images)
            )
            known = truth[key]["i2t" if direction == "image_to_text" else "t2i"]
            values, stays = (inverse, negative) if direction == "image_to_text" else (inverse.T, negative.T)
            scores, right = [], []
            for place, anchor in enumerate(anchors):
                if anchor not in known:
                    continue
                keep = stays[place]
                weights = values[place][keep] * keep.sum() / values[place][keep].sum()
                scores.append(-np.log(weights))
                right.append(np.isin(np.array(others)[keep], known[anchor]))
            score, is_right = np.concatenate(scores), np.concatenate(right)
            found = written[name][direction]["mixture"]
            assert (found["anchors"], found["negatives"]) == (len(scores), len(score))
            assert found["false_negatives"] == is_right.sum() > 5
            expected = mannwhitneyu(score[is_right], score[~is_right]).statistic / (is_right.sum() * (~is_right).sum())
            assert found["auc"] == pytest.approx(expected, abs=1e-5)
            assert found["rank_correlation"] is None
    assert Image.open(tmp_path / "out/detection.png").format == "PNG"


def test_from_cocos_own_files(run: Path, tmp_path: Path) -> None:
    """Karpathy's JSON with images under val2014/: features are the model's, a pair a caption."""
    package = pytest.importorskip("eccv_caption")
    metrics = package.Metrics()
    (tmp_path / "val2014").mkdir()
    entries = []
    for number, image in enumerate(list(metrics.eccv_gts["i2t"])[:60]):
        Image.new("RGB", (70, 50), (4 * number, 90, 200 - 3 * number)).save(tmp_path / f"val2014/{image}.jpg")
        said = [{"sentid": caption, "raw": f"a red thing {caption}"} for caption in metrics.coco_gts["i2t"][image]]
        entry = {"filename": f"{image}.jpg", "filepath": "val2014", "split": "test", "cocoid": image, "sentences": said}
        entries += [entry, {**entry, "split": "train", "cocoid": 1, "filename": "none.jpg"}]
    (tmp_path / "k.json").write_text(json.dumps({"images": entries}))
    asked = ["--coco", tmp_path / "k.json", "--images", tmp_path, "--save-features", tmp_path / "f"]
    analyse("detect", run, *asked, "--out", tmp_path / "out")
    written = json.loads((tmp_path / "out/detection.json").read_text())
    assert set(written["truths"]) == {"ECCV Caption", "CxC"}
    pairs = Pairs.load(tmp_path / "f")
    assert len(pairs) == sum(len(entry["sentences"]) for entry in entries[::2])
    image, caption = (int(part) for part in pairs.keys[7].split("-"))
    assert caption in metrics.coco_gts["i2t"][image]
    assert pairs.captions[7] == f"a red thing {caption}"
    twice = [row for row, key in enumerate(pairs.keys) if key.startswith(f"{image}-")]
    assert all(np.array_equal(pairs.image[row], pairs.image[7]) for row in twice)
    (tmp_path / f"val2014/{image}.jpg").unlink()
    with pytest.raises(UserError, match=f"{image}.jpg exists; give the folder"):
        analyse("detect", run, *asked)
    (tmp_path / f"val2014/{image}.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"{image}.jpg cannot be decoded"):
        analyse("detect", run, *asked)


def test_mistakes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k.json").write_text("{}")
    for arguments, line in (
        ([run, "--coco", "k.json"], "--coco needs --images"),
        ([run, "--coco", tmp_path / "none.json", "--images", "."], "none.json: No such file"),
        ([run, "--coco", tmp_path / "k.json", "--images", "."], "k.json is no Karpathy JSON"),
        ([run, "--scenes", "1"], "--scenes 1: at least 2"),
    ):
        with pytest.raises(UserError) as error:
            analyse("detect", *arguments)
        assert line in str(error.value)
    pairs, _ = coco_features(5)
    pairs.save(tmp_path / "f")
    monkeypatch.setitem(sys.modules, "eccv_caption", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"--coco needs the package eccv_caption.*pip install eccv_caption"):
        analyse("detect", tmp_path / "f")
