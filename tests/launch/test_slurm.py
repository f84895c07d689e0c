"""Launchers besides DeepSpeed's: launch/slurm.sh with stand-ins for srun and scontrol, and torchrun itself."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from documented import assert_documented
from ranks import free_port
from starting import ROOT, SMALL, begin, launch, losses, start

from sacl_ds.errors import UserError
from sacl_ds.launcher import take_place
from sacl_ds.training.engine import _device_number, _local_rank

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
    """The line of docs/running.md, with this node alone."""
    page = (ROOT / "docs/running.md").read_text().replace("\\\n", " ")
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


PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def srun_task(number: int, count: int, tasks: str, nodes: str, node: int, local: int, **more: str) -> dict[str, str]:
    """As srun sets them, over those that its batch script has; job 77, step 3."""
    counted = {"SLURM_NTASKS": count, "SLURM_PROCID": number, "SLURM_LOCALID": local, "SLURM_NODEID": node}
    counted |= {"SLURM_STEP_NUM_TASKS": count, "SLURM_STEP_NUM_NODES": len(tasks.split(",")), "SLURM_NNODES": 9}
    named = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": "other[1-9]", "SLURM_STEP_TASKS_PER_NODE": tasks}
    own = {"SLURM_JOB_ID": 77, "SLURM_STEP_ID": 3, "SLURM_TASKS_PER_NODE": "8(x9)", **counted, **named, **more}
    return {name: str(value) for name, value in own.items()}


def mpirun_rank(number: int, count: int, local: int, local_count: int) -> dict[str, str]:
    values = {"RANK": number, "SIZE": count, "LOCAL_RANK": local, "LOCAL_SIZE": local_count}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()} | {"PMIX_NAMESPACE": "931@1"}


HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
BATCH |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (srun_task(1, 2, "2", "node7", 0, 1), "1 2 1 2 127.0.0.1"),
        (srun_task(4, 5, "3,2", "gpu-[03-04,9]", 1, 1), "4 5 1 2 gpu-03"),
        (srun_task(2, 5, "3,2", "a[7,9]-b[1-2],login1", 0, 2), "2 5 2 3 a7-b1"),
        (srun_task(0, 5, "3,2", "first,second", 0, 0, MASTER_ADDR="10.0.0.1"), "0 5 0 3 10.0.0.1"),
        (srun_task(1, 2, "2", "node7", 0, 1, SLURM_PTY_PORT="4711"), None),
        (srun_task(0, 1, "1", "node7", 0, 0), None),
        (BATCH, None),
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, None),
        (BATCH | {"SLURM_STEP_ID": "4294967290"}, None),
        ({name: value for name, value in BATCH.items() if "PROCID" not in name}, None),
        (mpirun_rank(1, 2, 1, 2), "1 2 1 2 127.0.0.1"),
        (mpirun_rank(3, 4, 1, 2) | {"MASTER_ADDR": "node1"}, "3 4 1 2 node1"),
        (mpirun_rank(3, 4, 1, 2) | BATCH | {"SLURM_STEP_ID": "0"}, "3 4 1 2 node1"),
        (mpirun_rank(0, 1, 0, 1), None),
        (HYDRA, "1 2 1 2 127.0.0.1"),
        ({}, None),
    ],
)
def test_where_a_launcher_has_put_a_process(
    env: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of srun and mpirun; shells of a batch script, of salloc and of srun --pty are alone."""
    monkeypatch.setattr(os, "environ", dict(env))
    take_place()
    found = [os.environ.get(name) for name in PLACE]
    if expected is None:
        assert found[:4] == [None] * 4
    else:
        assert found == expected.split()
        assert 10000 <= int(os.environ["MASTER_PORT"]) < 30000
        before = dict(os.environ)
        take_place()
        assert os.environ == before


def test_ports_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def port(env: dict[str, str]) -> str:
        monkeypatch.setattr(os, "environ", dict(env))
        take_place()
        return os.environ["MASTER_PORT"]

    step = [port(srun_task(number, 5, "3,2", "a,b", number // 3, number % 3)) for number in range(5)]
    others = [{"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "4"}, {"SLURM_JOB_ID": "76"}]
    assert len({*step, *(port(srun_task(0, 2, "2", "a", 0, 0, **other)) for other in others)}) == 4
    # mpirun starts the ranks of other nodes by srun
    assert port(mpirun_rank(0, 2, 0, 1) | BATCH) == port(mpirun_rank(1, 2, 0, 1) | BATCH | {"SLURM_STEP_ID": "0"})
    assert port(mpirun_rank(0, 2, 0, 2)) != port(mpirun_rank(0, 2, 0, 2) | {"PMIX_NAMESPACE": "932@1"})


def test_without_an_address_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", mpirun_rank(3, 4, 1, 2))
    with pytest.raises(UserError) as caught:
        take_place()
    assert_documented(f"error: {caught.value}")


def test_the_only_device_that_a_task_sees_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"RANK": "5", "LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    monkeypatch.setattr(os, "environ", dict(own))
    assert _device_number(_local_rank(), 4) == 1
    assert os.environ == own
    assert _device_number(_local_rank(), 1) == 0
    assert (os.environ["LOCAL_RANK"], _local_rank()) == ("0", 1)
    monkeypatch.setattr(os, "environ", own | {"LOCAL_RANK": "2"})
    with pytest.raises(UserError) as caught:
        _device_number(_local_rank(), 2)
    assert_documented(f"error: {caught.value}")


TWO = ("teacher.steps=0", "train.steps=3")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("two")
    start(folder / "run", *TWO, ranks=2)
    return losses(folder / "run")


@pytest.mark.parametrize(
    "launcher", ["srun", *(pytest.param(each, marks=pytest.mark.slow) for each in ("mpirun", "srun, few variables"))]
)
def test_two_tasks_train_one_model(launcher: str, two_ranks: list[float], tmp_path: Path) -> None:
    line = ["launch/pretrain.py", "--ds_config", "ds_configs/zero2.json", f"output_dir={tmp_path}/run", *SMALL, *TWO]
    port = str(free_port())
    of = {
        "srun": lambda number: srun_task(number, 2, "2", "node7", 0, number),
        "mpirun": lambda number: mpirun_rank(number, 2, number, 2),
        "srun, few variables": lambda number: {"SLURM_PROCID": number, "SLURM_NTASKS": 2, "SLURM_LOCALID": number},
    }[launcher]
    out, err = tmp_path / "out", tmp_path / "err"
    env = [{name: str(value) for name, value in of(number).items()} | {"MASTER_PORT": port} for number in range(2)]
    tasks = [task for each in env for task in begin(line, 1, out, err, env=each)]
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0], err.read_text()[-3000:]
    assert out.read_text().count("2 ranks on this cpu") == 1
    assert losses(tmp_path / "run") == pytest.approx(two_ranks, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here")
def test_mpirun_itself(two_ranks: list[float], tmp_path: Path) -> None:
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "DS_ACCELERATOR": "cpu"}
    line = [sys.executable, "launch/pretrain.py", "--ds_config", "ds_configs/zero2.json", *SMALL, *TWO]
    command = ["mpirun", "--oversubscribe", "-n", "2", *line, f"output_dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(two_ranks, rel=1e-6)


SLURM_CONF = """
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""
DAEMONS = ("munged", "slurmctld", "slurmd")


@pytest.fixture(scope="module")
def slurm_itself() -> Iterator[dict[str, str]]:
    """A cluster of this machine alone, on the loopback; the environment of what is started in it."""
    if os.geteuid() or any(shutil.which(name) is None for name in (*DAEMONS, "srun")):
        pytest.skip("no slurm here, or not root")
    host, daemons = socket.gethostname().partition(".")[0], []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:  # a socket's path may not be long
        for name in ("state", "spool"):
            Path(folder, name).mkdir()
        Path(folder, "key").write_bytes(secrets.token_bytes(1024))
        Path(folder, "key").chmod(0o400)
        ports = [free_port(), free_port()]
        conf = Path(folder, "slurm.conf")
        conf.write_text(SLURM_CONF.format(host=host, ports=ports, folder=folder))
        env = os.environ | {"SLURM_CONF": str(conf), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        files = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = ["munged", "--foreground", "--force", *(f"--{name}={folder}/{file}" for name, file in files.items())]
        for line in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = stack.enter_context(Path(folder, f"{line[0]}.out").open("w"))
            daemons.append(subprocess.Popen(line, env=env, stdout=log, stderr=log))
            stack.callback(daemons[-1].wait)
            stack.callback(daemons[-1].terminate)
        until = time.monotonic() + 60
        while subprocess.run(["sinfo", "-h", "-o", "%t"], env=env, capture_output=True, text=True).stdout != "idle\n":
            assert time.monotonic() < until, "".join(path.read_text() for path in Path(folder).glob("*.out"))
            time.sleep(0.5)
        yield env


@pytest.mark.slow
def test_srun_itself(slurm_itself: dict[str, str], two_ranks: list[float], tmp_path: Path) -> None:
    """The losses of ranks that are started as the deepspeed launcher does."""
    line = [sys.executable, "launch/pretrain.py", "--ds_config", "ds_configs/zero2.json", *SMALL, *TWO]
    command = ["srun", "-n", "2", *line, f"output_dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, env=slurm_itself, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(two_ranks, rel=1e-6)


def by_deepspeed(launcher: str, host: str, env: dict[str, str], folder: Path, *more: str) -> None:
    """Train by `deepspeed --launcher`, without ssh."""
    (folder / "hosts").write_text(f"{host} slots=2\n")
    options = ("--hostfile", str(folder / "hosts"), "--force_multi", "--no_ssh_check", "--launcher", launcher)
    options += ("--master_addr", "127.0.0.1", "--master_port", str(free_port()), *more)
    line = ["--ds_config", "ds_configs/zero2.json", f"output_dir={folder}/run", *SMALL, *TWO]
    done = launch(*line, options=options, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_deepspeed_by_slurm(slurm_itself: dict[str, str], two_ranks: list[float], tmp_path: Path) -> None:
    by_deepspeed("slurm", socket.gethostname().partition(".")[0], slurm_itself, tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(two_ranks, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ompi_info") is None, reason="no OpenMPI here")
def test_deepspeed_by_openmpi(two_ranks: list[float], tmp_path: Path) -> None:
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "DS_ACCELERATOR": "cpu"}
    by_deepspeed("openmpi", "127.0.0.1", env, tmp_path, "--launcher_args=--oversubscribe")
    assert losses(tmp_path / "run") == pytest.approx(two_ranks, rel=1e-6)
