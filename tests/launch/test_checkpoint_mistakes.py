"""Checkpoints that cannot be used, and settings of checkpoints and restarts: lines of `docs/lab/mistakes.md`."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from documented import assert_documented, said
from starting import losses, start

from sacl_ds.config import RunConfig
from sacl_ds.faults.restarts import read_status
from sacl_ds.training.checkpoint_folder import complete

SHORT = ["teacher.steps=0", "train.steps=4", "train.save_every=2", "train.eval_every=2", "optim.warmup_steps=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    start(folder / "run", *SHORT)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def damage(folder: Path) -> None:
    file = folder / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lose(folder: Path) -> None:
    (folder / "rank_00000.safetensors").unlink()


def age(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    del state["format"]
    (folder / "state.json").write_text(json.dumps(state))


def test_a_held_out_figure_of_what_is_not_finite(tmp_path: Path) -> None:
    """A learning rate by which features overflow: the step is not lost, nor is the checkpoint before it."""
    steep = ["optim.lr_image=1e30", "optim.lr_text=1e30", "optim.warmup_steps=0"]
    more = ["train.steps=4", "train.eval_every=2", "train.save_every=1", "train.keep_checkpoints=1", "teacher.steps=0"]
    done = start(tmp_path / "run", *more, *steep, ranks=2, check=False)
    assert_documented(said(done, tmp_path))
    kept = [path.name for path in complete(tmp_path / "run/checkpoints")]
    assert kept == ["step_00000001", "step_00000002"]
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.checkpoint) == ("failed", 2)


@pytest.mark.parametrize("spoil", [damage, lose, age])
def test_a_checkpoint_that_cannot_be_used(spoil: Callable[[Path], None], copy: Path) -> None:
    """Where its folder is removed, as the line says, the one before it goes on."""
    spoil(copy / "run/checkpoints/step_00000004")
    done = start(copy / "run", "--resume", *SHORT, "train.steps=5", check=False)
    assert_documented(said(done, copy))
    if spoil is not age:
        shutil.rmtree(copy / "run/checkpoints/step_00000004")
        start(copy / "run", "--resume", *SHORT, "train.steps=5")
        assert len(losses(copy / "run")) == 5


def warnings(done: CompletedProcess[str], folder: Path) -> list[str]:
    lines = done.stdout.replace(str(folder), "/data").splitlines()
    return [line for line in lines if line.startswith("warning: --resume")]


def test_a_newest_checkpoint_that_lost_its_state(copy: Path) -> None:
    (copy / "run/checkpoints/step_00000004/state.json").unlink()
    (line,) = warnings(start(copy / "run", "--resume", *SHORT), copy)
    assert_documented(line)
    assert len(losses(copy / "run")) == 4


def test_more_steps_than_before(copy: Path) -> None:
    """Cosine over 3 steps after the warm-up, of which the last stood at 2, and over 7."""
    (line,) = warnings(start(copy / "run", "--resume", *SHORT, "train.steps=8"), copy)
    assert_documented(line)
    optim = RunConfig().optim
    for name, peak in (("lr_image", optim.lr_image), ("lr_text", optim.lr_text)):
        cosines = ((1 + math.cos(math.pi * 2 / steps)) / 2 for steps in (3, 7))
        was, stands = (peak * (optim.final_lr + (1 - optim.final_lr) * cosine) for cosine in cosines)
        assert f"{name} at {stands:.3g} in place of {was:.3g}" in line
    assert warnings(start(copy / "run", "--resume", *SHORT, "train.steps=8"), copy) == []


def test_other_losses(copy: Path) -> None:
    done = start(copy / "run", "--resume", *SHORT, "train.steps=5", "loss.matching_weight=0", check=False)
    assert_documented(said(done, copy))


def test_settings(tmp_path: Path) -> None:
    named = start(tmp_path / "run", *SHORT, "train.keep_best=text_to_image_R1", "train.keep_checkpoints=1", check=False)
    assert_documented(said(named, tmp_path))
    unnamed = start(tmp_path / "run", *SHORT, "train.max_restarts=1", "output_dir=null", check=False)
    assert_documented(said(unnamed, tmp_path))


def test_the_best_stays(tmp_path: Path) -> None:
    """With the newest and those of every fourth step."""
    best = "text_to_image_any_R@1"
    keep = ["train.keep_checkpoints=1", f"train.keep_best={best}", "train.keep_every=4"]
    start(tmp_path / "run", *SHORT, "train.steps=10", *keep)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    figures = {line["step"]: line["evaluation"][best] for line in lines if "evaluation" in line}
    assert sorted(figures) == [2, 4, 6, 8, 10]
    expected = {4, 8, 10, next(step for step in sorted(figures) if figures[step] == max(figures.values()))}
    kept = {int(path.name.removeprefix("step_")) for path in (tmp_path / "run/checkpoints").glob("step_*")}
    assert kept == expected
