"""Whole runs with the momentum model: what they log and save, and that they go on to the bit."""

import shutil
from pathlib import Path

import pytest
import torch
from documented import assert_documented, said
from safetensors.torch import load_file
from starting import losses, start

from sacl_ds.telemetry.records import read

MOMENTUM = ["momentum.enabled=true", "momentum.queue_size=40", "data.scenes.count=64", "model.dropout=0"]
STEPS = ["train.steps=8", "train.save_every=4", "loss.matching_weight=0"]
SAVED = "checkpoints/step_{:08d}/momentum.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a teacher phase; soft targets grow over 4 of its 8 steps, and the queue is full after 3."""
    folder = tmp_path_factory.mktemp("momentum") / "run"
    start(folder, *MOMENTUM, *STEPS)
    return folder


def stopped(whole: Path, folder: Path) -> Path:
    """The run as it was when stopped after step 4."""
    shutil.copytree(whole, folder)
    for name in ("model.safetensors", "checksums.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints/step_00000008")
    (folder / "checkpoints/latest").write_text("step_00000004")
    return folder


def test_what_is_logged_and_saved(whole: Path) -> None:
    assert losses(whole, "momentum_weight") == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])
    assert losses(whole, "queue_fill") == pytest.approx([0.4, 0.8, 1, 1, 1, 1, 1, 1])
    assert len(losses(whole, "pmi_positive")) == 8
    assert not any("momentum_weight" in line for line in read(whole / "teacher/metrics.jsonl"))
    assert not list((whole / "teacher").rglob("momentum.safetensors"))
    model, saved = load_file(whole / "model.safetensors"), load_file(whole / SAVED.format(8))
    assert {f"average.{name}" for name in model} == {name for name in saved if name.startswith("average.")}
    assert any(not (saved[f"average.{name}"] == value).all() for name, value in model.items())
    shapes = {name.removeprefix("queue."): tuple(v.shape) for name, v in saved.items() if name.startswith("queue.")}
    assert shapes == {
        "image": (40, 16), "text": (40, 16), "teacher_image": (40, 16), "teacher_text": (40, 16), "ids": (40, 2),
        "next": (), "size": (), "teacher": (64,),
    }  # fmt: skip
    assert int(saved["queue.next"]) == 8 * 16 % 40


def test_resume_goes_on_to_the_bit(whole: Path, tmp_path: Path) -> None:
    folder = stopped(whole, tmp_path / "run")
    start(folder, "--resume", *MOMENTUM, *STEPS)
    for name in ("loss", "itc", "mlm", "momentum_weight", "queue_fill"):
        assert losses(folder, name) == losses(whole, name), name
    for file in (SAVED.format(8), "model.safetensors"):
        ours, theirs = load_file(folder / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(value.equal(theirs[name]) for name, value in ours.items()), file


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_resume_with_more_ranks(stage: int, whole: Path, tmp_path: Path) -> None:
    folder = stopped(whole, tmp_path / "run")
    start(folder, "--resume", *MOMENTUM, *STEPS, ranks=2, stage=stage)
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)
    ours, theirs = (load_file(run / SAVED.format(8)) for run in (folder, whole))
    assert ours["queue.ids"].equal(theirs["queue.ids"])


def test_another_decay_goes_on(whole: Path, tmp_path: Path) -> None:
    folder = stopped(whole, tmp_path / "run")
    start(folder, "--resume", *MOMENTUM, *STEPS, "momentum.decay=0")
    model, saved = load_file(folder / "model.safetensors"), load_file(folder / SAVED.format(8))
    assert all(saved[f"average.{name}"].equal(value) for name, value in model.items())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["momentum.enabled=false"], "was trained with a momentum model; resume with momentum.enabled=true"),
        (
            ["momentum.queue_size=41"],
            "holds a queue of momentum.queue_size=40, not 41; resume with momentum.queue_size=40",
        ),
        (["data.duplicates=image"], "holds a queue of pairs with 2 ids each, not 1; resume with data.duplicates"),
    ],
)
def test_another_momentum_cannot_go_on(arguments: list[str], line: str, whole: Path, tmp_path: Path) -> None:
    folder = stopped(whole, tmp_path / "run")
    done = start(folder, "--resume", *MOMENTUM, *STEPS, *arguments, check=False)
    assert_documented(said(done, tmp_path))
    assert line in done.stderr
    assert (folder / "checkpoints/latest").read_text() == "step_00000004"


def test_another_teacher_cannot_go_on(whole: Path, tmp_path: Path) -> None:
    folder = stopped(whole, tmp_path / "run")
    done = start(folder, "--resume", *MOMENTUM, *STEPS, f"teacher.checkpoint={whole}", check=False)
    assert_documented(said(done, tmp_path))


def test_a_run_without_momentum_gets_none(tmp_path: Path) -> None:
    start(tmp_path / "run", "teacher.steps=0", "train.steps=2")
    arguments = ["--resume", "teacher.steps=0", "train.steps=3", "momentum.enabled=true"]
    assert_documented(said(start(tmp_path / "run", *arguments, check=False), tmp_path))


def test_a_queue_without_the_teacher_is_not_regulated_later(tmp_path: Path) -> None:
    arguments = [*MOMENTUM, "teacher.steps=1", "train.save_every=2", "momentum.regulate_queue="]
    start(tmp_path / "run", *arguments[:-1], f"{arguments[-1]}false", "train.steps=2")
    done = start(tmp_path / "run", "--resume", *arguments[:-1], f"{arguments[-1]}true", "train.steps=3", check=False)
    assert_documented(said(done, tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [("train.precision=bf16",), pytest.param(("--ds_config", "ds_configs/zero3_offload.json"), marks=pytest.mark.slow)],
)
def test_precision_and_offload(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """The average stays float32, and follows parameters that lie elsewhere."""
    start(tmp_path / "run", *MOMENTUM, "teacher.steps=0", "train.steps=4", "momentum.decay=0", *arguments)
    model, saved = load_file(tmp_path / "run/model.safetensors"), load_file(tmp_path / "run" / SAVED.format(4))
    assert all(saved[f"average.{name}"].equal(value) for name, value in model.items())
    assert {value.dtype for name, value in saved.items() if "ids" not in name} == {
        torch.float32,
        torch.int64,
        torch.uint8,
    }
    assert saved["queue.image"].dtype == saved["queue.text"].dtype == torch.float32
    assert saved["queue.image"].norm(dim=1).sub(1).abs().max() < 1e-5


def test_without_a_teacher_and_without_soft_targets(tmp_path: Path) -> None:
    """InfoNCE against momentum keys alone, at ZeRO 3 on two ranks."""
    arguments = ["loss.contrastive=infonce", "momentum.distill_weight=0", "momentum.queue_size=0", "train.steps=3"]
    start(tmp_path / "run", *MOMENTUM, *arguments, ranks=2, stage=3)
    assert losses(tmp_path / "run", "momentum_weight") == [0, 0, 0]
    saved = load_file(tmp_path / "run" / SAVED.format(3))
    assert {name for name in saved if name.startswith("queue.")} == {"queue.next", "queue.size", "queue.teacher"}
