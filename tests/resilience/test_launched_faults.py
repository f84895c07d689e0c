"""Faults under the deepspeed launcher, which orphans what it started, swallows statuses, and waits for ever."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from nodes import Cluster, Running, cluster, until
from ranks import free_port
from starting import ROOT, SMALL, losses, start

from sacl_ds.faults.restarts import read_status
from sacl_ds.telemetry.records import read
from sacl_ds.training.checkpoint_folder import FOLDER, latest, read_manifest, tag_of, verify

LONG = ["train.steps=100000", "train.save_every=5", "train.keep_checkpoints=2", "train.eval_every=null"]
PEER = 5  # train.peer_timeout, seconds
SILENCE = "-o ServerAliveInterval=1 -o ServerAliveCountMax=2"


def line(folder: Path, *arguments: str) -> list[str]:
    files = ["launch/pretrain.py", "--ds_config", "ds_configs/zero2.json", f"output_dir={folder}"]
    return [*files, *SMALL, "teacher.steps=0", *arguments]


def reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(entry["step"] >= step for entry in read(folder / "metrics.jsonl"))


def checkpoint_of(folder: Path) -> int:
    """The step of the newest one, which is whole."""
    state = latest(folder)
    assert state is not None
    place = folder / FOLDER / tag_of(state.step)
    manifest = read_manifest(place)
    verify(place, sorted(manifest.files), manifest)
    return state.step


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """launched(folder, *arguments): deepspeed --num_gpus 2, or torchrun, whose processes are all gone when the test is
    over."""
    begun: list[subprocess.Popen[bytes]] = []

    def go(folder: Path, *arguments: str, launcher: str = "deepspeed") -> subprocess.Popen[bytes]:
        count = {"deepspeed": "--num_gpus", "torchrun": "--nproc_per_node"}[launcher]
        command = [str(Path(sys.executable).parent / launcher), count, "2", "--master_port", str(free_port())]
        with (tmp_path / "said").open("wb") as out:
            environment = os.environ | {"DS_ACCELERATOR": "cpu"}
            begun.append(
                subprocess.Popen(
                    [*command, *line(folder, *arguments)],
                    cwd=ROOT,
                    env=environment,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )
        return begun[-1]

    yield go
    for process in begun:
        for each in belonging(tmp_path):
            each.kill()
        process.wait(30)


def belonging(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names that folder: launchers, supervisors, ranks and their loaders."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["deepspeed", "launch.py", "all, as Ctrl-C"])
def test_asking_the_launcher_to_stop(
    whom: str, launched: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """The run stops with a checkpoint, and leaves no process behind."""
    folder = tmp_path / "run"
    head = launched(folder, *LONG, "data.workers=1")
    until(reached(folder, 4), 120, lambda: (tmp_path / "said").read_text()[-3000:])
    if whom == "deepspeed":
        head.terminate()
    elif whom == "launch.py":
        psutil.Process(head.pid).children()[0].terminate()
    else:
        os.killpg(head.pid, signal.SIGINT)
    begun = time.monotonic()
    until(lambda: not belonging(folder), 60, lambda: (tmp_path / "said").read_text()[-3000:])
    print(f"asked: {whom}: all ended after {time.monotonic() - begun:.1f} s")
    head.wait(10)
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.checkpoint) == ("stopped", checkpoint_of(folder)), (tmp_path / "said").read_text()
    assert status.step == status.checkpoint


@pytest.mark.slow
def test_restarts(launched: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """Each rank once killed, the first ahead of any checkpoint: the run goes on by itself, to the same end."""
    folder = tmp_path / "run"
    settings = ["train.steps=24", "train.save_every=8", "train.eval_every=null", "data.workers=1"]
    head = launched(folder, *settings, "train.max_restarts=2")
    for rank, step in ((1, 2), (0, 12)):
        until(reached(folder, step), 120, lambda: (tmp_path / "said").read_text()[-3000:])
        (victim,) = [p for p in belonging(folder) if is_rank(p, rank)]
        victim.kill()
        until(lambda gone=victim: not gone.is_running(), 10, lambda: "it lives on")  # type: ignore[misc]
    assert head.wait(240) == 0, (tmp_path / "said").read_text()[-3000:]
    said = (tmp_path / "said").read_text()
    assert said.count("restart 1 of 2 (train.max_restarts)") == said.count("restart 2 of 2 (train.max_restarts)") == 1
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.restarts, status.step) == ("finished", 2, 24)
    start(tmp_path / "whole", "teacher.steps=0", *settings, ranks=2)
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    assert len(losses(folder)) == 24


@pytest.mark.slow
def test_restarts_under_torchrun(launched: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """Whose own store, by which ranks first met, is not where those that are started anew can meet."""
    folder = tmp_path / "run"
    settings = ["train.steps=8", "train.save_every=2", "train.eval_every=null", "data.workers=0"]
    head = launched(folder, *settings, "train.max_restarts=1", launcher="torchrun")
    until(reached(folder, 3), 120, lambda: (tmp_path / "said").read_text()[-3000:])
    (victim,) = [process for process in belonging(folder) if is_rank(process, 1)]
    victim.kill()
    assert head.wait(180) == 0, (tmp_path / "said").read_text()[-3000:]
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.restarts, status.step) == ("finished", 1, 8)


def is_rank(process: psutil.Process, rank: int) -> bool:
    """Whether it is the training process of that rank, below its supervisor."""
    try:
        environment, parent = process.environ(), process.parent()
    except psutil.Error:
        return False
    return (
        environment.get("RANK") == str(rank)
        and parent is not None
        and environment.get("SACL_DS_SUPERVISOR") == str(parent.pid)
    )


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as made:
        yield made


def left(nodes: Cluster) -> list[psutil.Process]:
    return [rank for node in nodes.nodes for rank in node.ranks().values()]


def go(nodes: Cluster, folder: Path, *arguments: str) -> Running:
    """A run over both nodes, some steps on."""
    settings = [*LONG, f"train.peer_timeout={PEER}", *arguments]
    run = nodes.deepspeed(*line(folder, *settings), env={"PDSH_SSH_ARGS_APPEND": SILENCE})
    until(reached(folder, 7), 120, lambda: run.text()[-3000:])
    return run


@pytest.mark.parametrize("how", [pytest.param("cut", marks=pytest.mark.slow), "killed"])
def test_a_lost_node(how: str, nodes: Cluster, tmp_path: Path) -> None:
    """Its network is cut for good, or all of its processes are killed: the run ends on both sides, and says why."""
    folder = tmp_path / "run"
    run = go(nodes, folder)
    begun = time.monotonic()
    nodes[1].cut() if how == "cut" else nodes[1].kill_processes()
    until(lambda: not left(nodes), PEER + 15, lambda: run.text()[-3000:])
    ranks = time.monotonic() - begun
    assert run.wait(PEER + 20) != 0
    print(f"{how}: ranks ended after {ranks:.1f} s, the launcher after {time.monotonic() - begun:.1f} s")
    cause = "has not been heard of for" if how == "cut" else "ended without a word"
    assert f"error: rank 1 on {nodes[1].name} " in run.text()
    assert cause in run.text()
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.checkpoint) == ("failed", checkpoint_of(folder))
    more = ["--resume", f"train.steps={checkpoint_of(folder) + 2}"]
    if how == "killed":  # by another launcher than before
        start(folder, *more, "teacher.steps=0")
    else:
        again = nodes.deepspeed(*line(folder, *more), hostfile=nodes.hosts("node1"))
        assert again.wait(300) == 0, again.text()[-3000:]


@pytest.mark.slow
def test_sigterm_to_the_launcher_of_several_nodes(nodes: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = go(nodes, folder)
    run.send(signal.SIGTERM)
    begun = time.monotonic()
    until(lambda: not left(nodes), 60, lambda: run.text()[-3000:])
    print(f"SIGTERM to deepspeed --hostfile: ranks ended after {time.monotonic() - begun:.1f} s")
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.checkpoint) == ("stopped", checkpoint_of(folder)), run.text()[-3000:]
