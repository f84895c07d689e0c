"""A run that loses a process ends everywhere within a stated time, names the cause, and goes on from its checkpoint."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from faulty import going
from safetensors.torch import load_file, save_file
from starting import ROOT, SCENES, losses, start

from sacl_ds.data.scenes import Scenes, place_of
from sacl_ds.faults.restarts import Exit, read_status
from sacl_ds.training.checkpoint_folder import latest, read_checkpoint

LONG = ["train.steps=100000", "train.save_every=5", "train.keep_checkpoints=2", "train.eval_every=null"]
STEPS = 40  # of a run that is asked to stop after the fourth; ranks look about once a second
SOON = 10  # seconds in which all ranks end when one is gone


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # of a parent that never asks for its children
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank(lost: int, tmp_path: Path) -> None:
    with going(tmp_path / "run", *LONG) as run:
        run.reach(7)
        os.kill(run.pid(lost), signal.SIGKILL)
        begun = time.monotonic()
        codes = run.ended()
        seconds = time.monotonic() - begun
        said = run.said
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == Exit.FAULT
    assert seconds < SOON
    assert f"error: rank {lost} on " in said
    assert "ended without a word" in said
    status = read_status(tmp_path / "run")
    state = latest(tmp_path / "run")
    assert status is not None
    assert state is not None
    assert (status.state, status.checkpoint) == ("failed", state.step)
    assert f"rank {lost} on " in status.message
    assert lost == 0 or f"(process {run.pid(1)})" in status.message
    start(tmp_path / "run", "--resume", *LONG, f"train.steps={state.step + 2}", "teacher.steps=0", ranks=1)
    ended = read_status(tmp_path / "run")
    assert ended is not None
    assert ended.state == "finished"


def test_a_rank_that_stands_still(tmp_path: Path) -> None:
    with going(tmp_path / "run", *LONG, "train.peer_timeout=3") as run:
        run.reach(3)
        os.kill(run.pid(1), signal.SIGSTOP)
        begun = time.monotonic()
        run.wait(lambda: run.processes[0].exitcode is not None, 30)
        seconds = time.monotonic() - begun
        said, before = run.said, read_status(tmp_path / "run")
        os.kill(run.pid(1), signal.SIGCONT)
        assert run.ended() == [Exit.FAULT, Exit.FAULT]
        lines = [line for line in run.said.splitlines() if line.startswith("error: ")]
    assert 3 < seconds < 3 + SOON
    assert "error: rank 1 on " in said
    assert "has not been heard of for" in said
    assert before is not None
    assert f"(process {run.pid(1)}) has not been heard of for" in before.message
    assert read_status(tmp_path / "run") == before  # whatever the rank thinks that wakes
    assert len(lines) == 2
    assert all(line.startswith(f"error: {before.message}; all ranks end; ") for line in lines), lines


def test_a_rank_that_waits_for_data(tmp_path: Path) -> None:
    """Its loader stands still: the others wait for it in a collective, and the one at fault is named."""
    with going(tmp_path / "run", *LONG, "train.step_timeout=2", "data.workers=1") as run:
        run.reach(3)
        loader = run.loader(1)
        loader.suspend()
        begun = time.monotonic()
        codes = run.ended()
        seconds = time.monotonic() - begun
        said = run.said
    assert codes == [Exit.FAULT, Exit.FAULT]
    assert 2 < seconds < 2 + SOON
    assert f"(process {run.pid(1)}) has been waiting for data" in said
    assert "the others wait" in said
    assert gone(loader)


def test_a_killed_loader(tmp_path: Path) -> None:
    with going(tmp_path / "run", *LONG, "data.workers=1") as run:
        run.reach(3)
        loader = run.loader(1)
        loader.kill()
        codes = run.ended()
        said = run.said
    assert codes == [Exit.FAULT, Exit.FAULT]
    assert str(loader.pid) in said or "the connection to a loader broke" in said
    assert "a loader process of rank 1 was killed" in said
    assert "Traceback" not in said
    status = read_status(tmp_path / "run")
    assert status is not None
    assert "rank 1" in status.message


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_asked_to_stop(asked: int, tmp_path: Path) -> None:
    """By SIGTERM to one rank: all stop after the same step, with a checkpoint, and what follows is as without."""
    with going(tmp_path / "run", f"train.steps={STEPS}", "data.workers=1") as run:
        run.reach(4)
        children = [child for rank in (0, 1) for child in run.children(rank)]
        for process in (psutil.Process(run.pid(asked)), run.loader(asked)):  # as DeepSpeed's launcher does
            process.terminate()
        codes = run.ended()
        said = run.said
        run.wait(lambda: all(map(gone, children)), 10)
    assert codes == [Exit.STOPPED, Exit.STOPPED], said
    assert said.count("stopped by") == 1
    status, state = read_status(tmp_path / "run"), latest(tmp_path / "run")
    assert status is not None
    assert state is not None
    assert (status.state, status.step, status.checkpoint) == ("stopped", state.step, state.step)
    assert 4 <= state.step < STEPS
    start(tmp_path / "run", "--resume", "teacher.steps=0", f"train.steps={STEPS}", ranks=2)
    start(tmp_path / "whole", "teacher.steps=0", f"train.steps={STEPS}", ranks=2)
    assert len(losses(tmp_path / "whole")) == STEPS
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def captions_of(key: str) -> list[str]:
    place = place_of(key)
    assert place is not None
    return Scenes(SCENES, place[0])[place[1]].captions


def spoil(run: Path, word: str) -> None:
    """Make the embedding of a word so large in a run's weights that its sum is no number."""
    number = json.loads((run / "tokenizer/tokenizer.json").read_text())["model"]["vocab"][word]
    state = load_file(run / "model.safetensors")
    state["text_encoder.bert.embeddings.word_embeddings.weight"][number] = 3e38
    save_file(state, run / "model.safetensors", {"format": "pt"})
    (run / "checksums.json").unlink()


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_steps_that_are_not_finite(stage: int, tmp_path: Path) -> None:
    """A word whose embedding overflows: the steps that meet it are left out and its samples named, on whichever rank,
    and too many end the run, with the weights as they were."""
    start(tmp_path / "first", "teacher.steps=0", "train.steps=1")
    word = "dotted"
    spoil(tmp_path / "first", word)
    settings = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    more = ["teacher.steps=0", f"model.start={tmp_path / 'first'}", "train.max_bad_steps=3", "train.eval_every=null"]
    more += ["--ds_config", str(tmp_path / "ds.json"), "loss.mlm_weight=0", "train.save_every=1", "data.workers=0"]
    done = start(tmp_path / "run", *more, ranks=2, check=False)
    assert done.returncode == Exit.MISTAKE
    assert done.stderr.count("4 of the last 1000 steps had a loss or gradient that is not finite") == 1
    lines = [json.loads(line) for line in (tmp_path / "run/bad_steps.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert len(line["keys"]) == 16
        said = {key: [word in caption.split() for caption in captions_of(key)] for key in line["keys"]}
        # one of a picture's captions is trained on
        assert {key for key, each in said.items() if all(each)} <= set(line["offending"])
        assert set(line["offending"]) <= {key for key, each in said.items() if any(each)}
        assert line["offending"]
    left_out = {line["step"] for line in lines}
    state = latest(tmp_path / "run")
    assert state is not None
    assert state.optimizer_step == state.step - len([step for step in left_out if step <= state.step])
    weights, _ = read_checkpoint(tmp_path / f"run/checkpoints/step_{state.step:08d}")
    assert all(value.isfinite().all() for value in weights.values())
