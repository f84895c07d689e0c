"""Whole runs over `deepspeed --hostfile`, pdsh and ssh, on two nodes with a network between them (`nodes`)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Cluster, Running, cluster, until
from starting import SMALL, losses, program

STEPS, EVERY = 18, 6


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("nodes")) as made:
        yield made


def line(folder: Path, *arguments: str) -> list[str]:
    # without what is drawn from a rank's own pairs, so that one rank and two lose alike
    same = ["teacher.steps=0", "model.dropout=0", "loss.matching_weight=0"]
    settings = [*SMALL, *same, f"train.steps={STEPS}", f"train.save_every={EVERY}"]
    files = ["launch/pretrain.py", "--ds_config", "ds_configs/zero2.json", f"output_dir={folder}"]
    return [*files, *settings, *arguments]


def kill_when_saved(nodes: Cluster, run: Running, folder: Path, step: int) -> None:
    """kill -9 of everything on all nodes as soon as that step is saved."""
    latest = folder / "checkpoints/latest"

    def saved() -> bool:
        assert run.process.poll() is None, run.text()[-3000:]
        return latest.is_file() and latest.read_text() == f"step_{step:08d}"

    until(saved, 240, lambda: f"no checkpoint of step {step}:\n{run.text()[-3000:]}")
    for node in reversed(nodes.nodes):
        node.kill_processes()
    assert run.wait(30) != 0


@pytest.mark.slow
def test_train_on_two_nodes_then_one_then_two(nodes: Cluster, tmp_path: Path) -> None:
    """Killed after the first and the second checkpoint; equal to one run on one node that nothing stopped."""
    program(*line(tmp_path / "alone"), ranks=2)
    expected = losses(tmp_path / "alone")
    assert len(expected) == STEPS

    folder = tmp_path / "run"
    first = nodes.deepspeed(*line(folder))
    kill_when_saved(nodes, first, folder, EVERY)
    assert "2 ranks on this cpu" in first.text()
    reached = losses(folder)
    assert len(reached) >= EVERY
    assert reached == pytest.approx(expected[: len(reached)], rel=1e-6)

    second = nodes.deepspeed(*line(folder, "--resume"), hostfile=nodes.hosts("node1"))
    kill_when_saved(nodes, second, folder, 2 * EVERY)
    assert "1 rank on this cpu" in second.text()

    third = nodes.deepspeed(*line(folder, "--resume"))
    assert third.wait(300) == 0, third.text()[-3000:]
    assert losses(folder) == pytest.approx(expected, rel=1e-4)
    assert losses(folder)[:EVERY] == reached[:EVERY]


WAITS = """
import os, pathlib, time
print("up", flush=True)
while os.environ["RANK"] == "1" or not pathlib.Path("GO").exists():
    time.sleep(0.2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "ends"), [("-o ServerAliveInterval=1 -o ServerAliveCountMax=2", True), ("", False)]
)
def test_without_keep_alive_the_launcher_outlives_a_node_that_was_cut_off(
    arguments: str, ends: bool, tmp_path: Path
) -> None:
    """The rank on this side ends by itself; the ssh to the other hears nothing, not even that it is gone."""
    script, go = tmp_path / "waits.py", tmp_path / "go"
    script.write_text(WAITS.replace("GO", str(go)))
    with cluster(tmp_path) as nodes:
        run = nodes.deepspeed(script, options=("--no_local_rank",), env={"PDSH_SSH_ARGS_APPEND": arguments})
        run.wait_for("node1: up", 60)
        run.wait_for("node2: up", 60)
        assert {node.name: list(node.ranks()) for node in nodes.nodes} == {"node1": [0], "node2": [1]}
        nodes[1].cut()
        go.touch()
        run.wait_for("exits successfully", 30)
        if ends:
            assert run.wait(15) == 255
            assert "node2: ssh exited with exit code 255" in run.text()
        else:
            with pytest.raises(AssertionError, match="still at work"):
                run.wait(8)
