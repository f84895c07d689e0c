"""Launchers besides DeepSpeed's: launch/slurm.sh with stand-ins for srun and scontrol, and torchrun itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port
from starting import ROOT, SMALL, losses

# as SLURM's: starts SLURM_NTASKS tasks at once, each with its own number, and ends with a bad status of any
SRUN = """#!/usr/bin/env bash
set -u
echo "$@" > "$STAND_INS/srun_options"
while [[ $1 == --* ]]; do shift; done
jobs=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" &
    jobs+=($!)
done
status=0
for job in "${jobs[@]}"; do wait "$job" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then printf '127.0.0.1\\nnode2\\n'; else echo "$@" >> "$STAND_INS/asked"; fi
"""
SHOWS = """import json, os, sys
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
with open(f"{os.environ['STAND_INS']}/rank{os.environ['RANK']}.json", "w") as file:
    json.dump({"argv": sys.argv[1:], **{name: os.environ[name] for name in names}}, file)
if "state" in os.environ:
    with open(f"{os.environ['RUN']}/status.json", "w") as file:
        json.dump({"state": os.environ["state"]}, file)
sys.exit(int(os.environ.get("ends_with", 0)))
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    folder = tmp_path / "stand_ins"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("shows.py", SHOWS)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "run").mkdir()
    return folder


def slurm(
    folder: Path, *arguments: str, tasks: int = 4, per_node: int = 2, **more: str
) -> subprocess.CompletedProcess[str]:
    """bash launch/slurm.sh ARGUMENTS as sbatch starts it."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": str(tasks)}
    env = os.environ | job | {"SLURM_NTASKS_PER_NODE": str(per_node), "STAND_INS": str(folder), "OMP_NUM_THREADS": "1"}
    env |= {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"} | more
    return subprocess.run(["bash", "launch/slurm.sh", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def seen(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def test_each_task_is_a_rank(stand_ins: Path, tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}/run", "data.shards=/a b/{0..3}.tar", 'loss.x="$HOME"']
    done = slurm(stand_ins, *settings, SCRIPT=str(stand_ins / "shows.py"), SLURM_JOB_ID="41234567")
    assert done.returncode == 0, done.stderr
    tasks = seen(stand_ins)
    assert [(t["RANK"], t["LOCAL_RANK"]) for t in tasks] == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    for task in tasks:
        assert task["argv"] == ["--ds_config", "ds_configs/zero2.json", *settings]
        assert (task["WORLD_SIZE"], task["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert (task["MASTER_ADDR"], task["MASTER_PORT"]) == ("127.0.0.1", str(20000 + 41234567 % 20000))
    assert "--kill-on-bad-exit=1" in (stand_ins / "srun_options").read_text()


@pytest.mark.parametrize(
    ("state", "status", "expected", "queued"),
    [("stopped", 75, 0, True), ("failed", 70, 70, False), ("finished", 0, 0, False)],
)
def test_a_pre_empted_job_queues_again(
    state: str, status: int, expected: int, queued: bool, stand_ins: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = {"SCRIPT": str(stand_ins / "shows.py"), "state": state, "ends_with": str(status), "RUN": str(run)}
    done = slurm(stand_ins, f"output_dir={run}", SLURM_JOB_ID="77", **more)
    assert done.returncode == expected
    assert f"run {run}: {state} " in done.stdout
    asked = stand_ins / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 77\n" if queued else "")


def test_a_run_with_a_checkpoint_goes_on(stand_ins: Path, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/latest").touch()
    done = slurm(stand_ins, f"output_dir={tmp_path}/run", SCRIPT=str(stand_ins / "shows.py"))
    assert done.returncode == 0, done.stderr
    assert "--resume" in seen(stand_ins)[0]["argv"]  # type: ignore[operator]


def test_without_output_dir_it_stops(stand_ins: Path) -> None:
    done = slurm(stand_ins, "train.steps=2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no output_dir=FOLDER")


@pytest.mark.slow
def test_slurm_trains(stand_ins: Path, tmp_path: Path) -> None:
    settings = [*SMALL, "teacher.steps=0", "train.steps=3", f"output_dir={tmp_path}/run"]
    done = slurm(stand_ins, *settings, tasks=2, per_node=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(losses(tmp_path / "run")) == 3
    assert "2 ranks on this cpu" in done.stdout


@pytest.mark.slow
def test_torchrun_trains_alike(tmp_path: Path) -> None:
    """The line of docs/many_nodes.md, with this node alone."""
    page = (ROOT / "docs/many_nodes.md").read_text().replace("\\\n", " ")
    line = re.search(r"^ {4}(torchrun .*)$", page, re.MULTILINE)
    assert line is not None
    words = line[1].replace("...", "").split()
    own = {"2": "1", "8": "2", "node1:29500": f"127.0.0.1:{free_port()}"}
    words = [own.get(word, word) for word in words]
    settings = [*SMALL, "teacher.steps=0", "train.steps=3", f"output_dir={tmp_path}/run"]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    program = [str(Path(sys.executable).parent / words[0]), *words[1:], *settings]
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(losses(tmp_path / "run")) == 3
    assert "2 ranks on this cpu" in done.stdout
