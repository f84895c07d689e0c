"""Starts the commands of launch/ and tools/ as users do: through the deepspeed launcher, or as any launcher starts its
ranks, in processes that have done their imports (`ranks.prepared`)."""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ranks import free_port, prepared

from sacl_ds.telemetry.records import read

ROOT = Path(__file__).parents[2]
SCENES = 320  # of the training data of SMALL
SMALL = [
    "data.scenes.eval_count=20", "train.global_batch_size=16", "train.steps=20", "train.log_every=1", "teacher.steps=4",
    "loss.alpha_end=0.5",
    "model.text_width=32", "model.text_heads=2", "model.embed_dim=16", f"data.scenes.count={SCENES}",
    "model.image_encoder_arguments={embed_dim: 32, depth: 1, num_heads: 2, patch_size: 16}",
]  # fmt: skip


def launch(
    *arguments: str, options: tuple[str, ...] = ("--num_gpus", "2"), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """deepspeed OPTIONS launch/pretrain.py ARGUMENTS. The launcher itself takes seconds to start."""
    port = () if "--master_port" in options else ("--master_port", str(free_port()))
    launcher = [str(Path(sys.executable).parent / "deepspeed"), *options, *port]
    return subprocess.run(
        [*launcher, "launch/pretrain.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"} if env is None else env,
        capture_output=True,
        text=True,
    )


def start(
    output: Path,
    *arguments: str,
    ranks: int = 1,
    stage: int | str = 2,
    check: bool = True,
    device: str = "cpu",
    launcher: bool = False,
    mounts: int | None = None,
    before: Callable[[], Any] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A small run with ds_configs/zero{stage}.json into `output`; stdout and stderr of all ranks together.

    Without `launcher` the ranks are started from here, without its cost and that of the imports (`ranks.prepared`);
    as under the launcher, the first that fails ends the others. mounts, before: as `program` has them.
    """
    line = ["--ds_config", f"ds_configs/zero{stage}.json", f"output_dir={output}", *SMALL, *arguments]
    if launcher or device != "cpu":
        done = launch(*line, options=("--num_gpus", str(ranks)), env={**os.environ, "DS_ACCELERATOR": device})
    else:
        done = program("launch/pretrain.py", *line, ranks=ranks, check=False, mounts=mounts, before=before)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def losses(folder: Path, name: str = "loss") -> list[float]:
    """That figure of every logged step of a run."""
    return [line[name] for line in read(folder / "metrics.jsonl") if name in line]


def program(
    path: str,
    *arguments: str | Path,
    ranks: int = 1,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    before: Callable[[], Any] | None = None,
    mounts: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """python PATH ARGUMENTS in the repository's root, on so many ranks; stdout and stderr of all of them together.

    path: a file, or the name of a module, as after `python -m`. env: beside this process's. before: called in each
    process ahead of it. mounts: a process whose file systems they see.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        processes = begin([path, *map(str, arguments)], ranks, out, err, env=env, before=before, mounts=mounts)
        while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes):
            time.sleep(0.02)
        for process in processes:
            process.terminate()
            process.join()
        codes = [process.exitcode for process in processes]
        code = next((code for code in codes if code > 0), codes[0])
        done = subprocess.CompletedProcess([path, *arguments], code, out.read_text(), err.read_text())
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def begin(
    line: list[str],
    ranks: int,
    out: Path,
    err: Path,
    *,
    env: Mapping[str, str] | None = None,
    before: Callable[[], Any] | None = None,
    mounts: int | None = None,
) -> list[Any]:
    """The processes of `program`, under way; what they say is appended to the files."""
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(ranks):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        whole = {**os.environ, **(env or {}), **{name: str(value) for name, value in own.items()}}
        processes.append(prepared().Process(target=_run, args=(line, whole, (out, err), before, mounts)))
        processes[-1].start()
    return processes


def _run(
    line: list[str],
    env: dict[str, str],
    said: tuple[Path, Path],
    before: Callable[[], Any] | None,
    mounts: int | None,
) -> None:
    """In a process of its own: `python LINE`."""
    assert "preloaded" in sys.modules
    if mounts is not None:
        with open(f"/proc/{mounts}/ns/mnt") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ |= env
    if before is not None:
        before()
    sys.argv = line
    if line[0].endswith(".py"):
        sys.path.insert(0, str(Path(line[0]).resolve().parent))
        runpy.run_path(line[0], run_name="__main__")
    else:
        runpy.run_module(line[0], run_name="__main__", alter_sys=True)
