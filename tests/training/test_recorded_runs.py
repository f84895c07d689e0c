"""Records of real runs equal what numpy makes of the same features; they cost no bit of the training itself."""

from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_weights import dense, information
from starting import losses, start

from sacl_ds.config import RunConfig
from sacl_ds.config_file import load_config
from sacl_ds.data.batch import Batch
from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.sources import training_data
from sacl_ds.data.text import Tokenizer
from sacl_ds.losses import Regulation, similarity_regulated_loss
from sacl_ds.losses.distribution import EDGES
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import load_model
from sacl_ds.model.teacher import Teacher, load_teacher, teacher_features
from sacl_ds.telemetry.records import DIRECTIONS, QUANTILES, read, read_figures, read_lowest

CONTRASTIVE_ONLY = ["loss.matching_weight=0", "loss.mlm_weight=0"]
# so small a learning rate changes no weight: those saved at the end are those of every step
STILL = [*CONTRASTIVE_ONLY, "optim.lr_image=1e-30", "optim.lr_text=1e-30", "train.steps=5", "records.every=2"]


def batch_of(run: RunConfig, folder: Path, step: int) -> Batch:
    """The global batch of a step of a run on scenes, made anew."""
    run = run.model_copy(update={"loss": run.loss.model_copy(update={"mlm_weight": 0.0})})
    data = training_data(run, None, Tokenizer.load(folder / "tokenizer", run.model.max_tokens), None, True)
    loader = BatchLoader(data.source, data.order, data.collator, rank=0, world=1, workers=0, start_step=step)
    return next(islice(iter(loader), 1))


@cache
def models_of(folder: Path) -> tuple[SaclModel, RunConfig, Teacher]:
    model, run, _ = load_model(folder, "output_dir")
    return model.eval(), run, load_teacher(str(folder / "teacher"), torch.device("cpu"))


@torch.no_grad()
def features_of(folder: Path, step: int) -> tuple[dict[str, np.ndarray], Batch]:
    model, run, teacher = models_of(folder)
    batch = batch_of(run, folder, step)
    _, image = model.encode_image(batch.images)
    _, text = model.encode_text(batch.input_ids, batch.attention_mask)
    teacher_image, teacher_text = teacher_features(teacher, batch)
    named = {"image": image, "text": text, "teacher_image": teacher_image, "teacher_text": teacher_text}
    return {name: x.numpy() for name, x in named.items()} | {"ids": batch.pair_ids.numpy()}, batch


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 3)])
def test_records_are_what_numpy_makes_of_the_features(ranks: int, stage: int, tmp_path: Path) -> None:
    """Sharp enough that weights spread; a teacher of random weights; alpha falls from 1 over the steps."""
    folder = tmp_path / "run"
    settings = ["loss.sharpness=9", "loss.teacher_sharpness=5", "records.lowest=12", "loss.alpha_end_step=4"]
    start(folder, *STILL, *settings, "data.scenes.count=60", ranks=ranks, stage=stage)
    recorded = read_figures(folder)
    assert [(row["step"], row["direction"]) for row in recorded] == [(s, d) for s in (1, 2, 4, 5) for d in DIRECTIONS]
    for number, (step, alpha) in enumerate(((1, 1.0), (2, 0.875), (4, 0.625), (5, 0.5))):
        data, batch = features_of(folder, step - 1)
        low = read_lowest(folder, step)
        expected = dense(data, Regulation(alpha, 9.0, 5.0), 1 / 0.07, 12)
        for direction, row, known in zip(DIRECTIONS, recorded[2 * number :], expected, strict=False):
            weights = known["weights"]
            assert (row["alpha"], row["sharpness"], row["teacher_sharpness"]) == (alpha, 9.0, 5.0)
            assert row["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-6)
            assert (row["anchors"], row["pairs"]) == (16, known["pairs"])
            assert row["duplicates"] == (16 * 15 - known["pairs"]) // 2
            for name in ("effective", "effective_share", "mass", "shape"):
                assert row[name] == pytest.approx(known[name], rel=1e-4, abs=1e-4), name
            # a weight on an edge may fall on either side of it
            assert np.abs(np.array(row["histogram"]) - np.histogram(weights, EDGES)[0]).sum() <= 2
            under = [(weights < t).mean() for t in np.arange(1, 10) / 10]
            np.testing.assert_allclose(row["under"], under, atol=1.01 / len(weights))
            exact = np.quantile(weights, QUANTILES, method="inverted_cdf")
            np.testing.assert_allclose(np.log10(row["quantiles"]), np.log10(exact), atol=0.051)
            mine = [one for one in low if one["direction"] == direction]
            assert [one["place"] for one in mine] == list(range(12))
            for one, (weight, anchor, negative, student, teacher) in zip(mine, known["lowest"], strict=True):
                found = [one["weight"], one["student_similarity"], one["teacher_similarity"]]
                assert found == pytest.approx([weight, student, teacher], rel=1e-4, abs=1e-5)
                assert (one["anchor_key"], one["negative_key"]) == (batch.keys[anchor], batch.keys[negative])
                assert (one["anchor_caption"], one["anchor_shard"]) == (batch.captions[anchor], "")
                assert (one["negative_caption"], one["negative_shard"]) == (batch.captions[negative], "")
        assert np.ptp(np.log(expected[0]["weights"])) > 0.5
        logged = next(line for line in read(folder / "metrics.jsonl") if line["step"] == step and "loss" in line)
        for name in ("pmi_positive", "pmi_negative", "pmi_negative_target", "infonce_bound"):
            assert recorded[2 * number][name] == recorded[2 * number + 1][name] == pytest.approx(logged[name])


def test_the_log_says_what_the_records_say_where_negatives_are_removed(tmp_path: Path) -> None:
    """Over all negatives, by numpy from the features; log and records to all digits that are logged."""
    folder = tmp_path / "run"
    settings = ["loss.sharpness=9", "loss.teacher_sharpness=5", "loss.alpha_start=0.5", "loss.alpha_end=0.5"]
    start(folder, *STILL, *settings, "loss.drop_below=0.8", "loss.negative_mass=0.5", "data.scenes.count=60", ranks=2)
    regulation = Regulation(0.5, 9.0, 5.0, 0.5, 0.8)
    recorded = read_figures(folder)
    for number, step in enumerate((1, 2, 4, 5)):
        rows = recorded[2 * number : 2 * number + 2]
        log = next(line for line in read(folder / "metrics.jsonl") if line["step"] == step and "loss" in line)
        assert log["negative_mass_log"] == pytest.approx((rows[0]["mass"] + rows[1]["mass"]) / 2, rel=1e-8)
        assert log["negatives"] * 16 == pytest.approx(rows[0]["pairs"])
        data, _ = features_of(folder, step - 1)
        for name, value in information(data, regulation, 1 / 0.07).items():
            assert log[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
        assert log["negative_mass_log"] < np.log(0.5) - 0.1  # the mass of those that stay, less of those that do not


def test_infonce_weighs_everything_one(tmp_path: Path) -> None:
    start(tmp_path / "run", "loss.contrastive=infonce", *CONTRASTIVE_ONLY, "train.steps=3")
    rows = read_figures(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 1, 3, 3]
    for row in rows:
        assert (row["mass"], row["shape"], row["effective_share"]) == (0, 0, pytest.approx(1))
        assert row["histogram"][int(np.searchsorted(EDGES, 1.0))] == row["pairs"]
    assert read_lowest(tmp_path / "run") == []


def test_recording_changes_nothing(tmp_path: Path) -> None:
    """To the bit, also where a record asks for statistics that no line of the log needs."""
    arguments = ["teacher.steps=0", "train.steps=8", "train.log_every=8", "loss.sharpness=6"]
    start(tmp_path / "with", *arguments, "records.every=1")
    start(tmp_path / "without", *arguments, "records.every=0")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert not (tmp_path / "without/weights").exists()
    assert len(read_figures(tmp_path / "with")) == 16


def test_a_resumed_run_has_the_records_of_one_that_never_stopped(tmp_path: Path) -> None:
    arguments = [*CONTRASTIVE_ONLY, "teacher.steps=0", "loss.sharpness=6", "records.every=4"]
    start(tmp_path / "whole", *arguments, "train.steps=10")
    # the schedule of ten steps; the record of a step that its checkpoint does not cover is made again
    start(tmp_path / "resumed", *arguments, "train.steps=10", "train.save_every=6")
    latest = tmp_path / "resumed/checkpoints/latest"
    latest.write_text("step_00000006")
    (tmp_path / "resumed/checksums.json").unlink()  # as if it had been killed there
    for path in (tmp_path / "resumed/weights").glob("*_00000008.parquet"):
        path.write_bytes(b"of a step that is done again")
    start(tmp_path / "resumed", "--resume", *arguments, "train.steps=10", "train.save_every=6")
    whole, resumed = (read_figures(tmp_path / name) for name in ("whole", "resumed"))
    assert {row["step"] for row in whole} == {1, 4, 8, 10}
    assert resumed == whole
    low, expected = (read_lowest(tmp_path / name) for name in ("resumed", "whole"))
    assert len(low) == 2 * 64
    assert all(np.isnan(row.pop("teacher_similarity")) for row in [*low, *expected])
    assert low == expected


def test_a_hardly_noticeable_share_of_a_steep_teacher_trains(tmp_path: Path) -> None:
    """Without the student's term: weights are flat up to a similarity, here 0.23, and fall steeply from there."""
    settings = ["loss.sharpness=0", "loss.teacher_sharpness=200", "loss.alpha_start=1e-20", "loss.alpha_end=1e-20"]
    start(tmp_path / "run", *CONTRASTIVE_ONLY, *settings, "train.steps=12", "data.scenes.count=3000")
    assert (tmp_path / "run/teacher/model.safetensors").exists()
    rows = read_figures(tmp_path / "run")
    assert {(row["alpha"], row["sharpness"], row["teacher_sharpness"]) for row in rows} == {(1e-20, 0.0, 200.0)}
    turn = 20 * np.log(10) / 200
    low = [row for row in read_lowest(tmp_path / "run") if row["direction"] == "image_to_text"]
    assert low[0]["teacher_similarity"] > turn
    assert low[0]["weight"] < 0.9
    values = losses(tmp_path / "run")
    assert len(values) == 12
    assert all(np.isfinite(values))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_share_of_false_negatives_sets_where_weights_fall(ranks: int, tmp_path: Path) -> None:
    """Against the teacher's cosines over the first 1024 pairs, taken from the finished run; at any number of ranks."""
    folder = tmp_path / "run"
    start(folder, *CONTRASTIVE_ONLY, "loss.false_share=0.1", "train.steps=3", "records.every=1", ranks=ranks)
    saved = load_config(folder / "config.yaml", [])
    assert (saved.loss.sharpness, saved.loss.teacher_sharpness) == (0, 30)
    assert saved.loss.alpha_start == saved.loss.alpha_end
    alpha = saved.loss.alpha_end
    threshold = np.log((1 - alpha) / alpha) / 30
    cosines = []
    for step in range(1024 // saved.train.global_batch_size):
        features, _ = features_of(folder, step)
        negative = ~(features["ids"][:, None] == features["ids"][None]).any(-1)
        cosines.append((features["teacher_image"] @ features["teacher_text"].T)[negative])
    assert (np.concatenate(cosines) > threshold).mean() == pytest.approx(0.1, abs=0.001)
    assert {row["alpha"] for row in read_figures(folder)} == {alpha}
    lightest = read_lowest(folder)[0]
    assert lightest["teacher_similarity"] > threshold
    assert lightest["weight"] < 0.7


@pytest.mark.parametrize("backend", ["reference", "streaming", "triton"])
def test_the_loss_bears_a_tiny_share_of_the_teacher(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    image, text, of_image, of_text = (
        torch.nn.functional.normalize(torch.randn(24, 6, generator=g), dim=1) for _ in "1234"
    )
    out = similarity_regulated_loss(
        image, text, torch.tensor(9.0), of_image, of_text, 1e-20, 0.0, teacher_sharpness=60.0, backend=backend
    )
    c, t = (image.double() @ text.double().T).numpy(), (of_image.double() @ of_text.double().T).numpy()
    inverse = 1 / (1e-20 * np.exp(60 * t) + 1)
    expected = []
    for cosine, one_over in ((c, inverse), (c.T, inverse.T)):
        one_over = one_over * (1 - np.eye(24))
        w = 23 * one_over / one_over.sum(1, keepdims=True) + np.eye(24)
        expected.append(np.log((w * np.exp(9 * cosine)).sum(1)) - 9 * np.diagonal(cosine))
    assert inverse.min() < 0.2
    assert np.median(inverse) > 0.99
    np.testing.assert_allclose(out.image_to_text.numpy(), expected[0], rtol=1e-4)
    np.testing.assert_allclose(out.text_to_image.numpy(), expected[1], rtol=1e-4)
