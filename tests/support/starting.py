"""Starts launch/pretrain.py as users do: through the deepspeed launcher, or as any launcher starts its ranks."""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ranks import free_port, prepared

from sacl_ds.telemetry.metrics import read

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.scenes.eval_count=20", "train.global_batch_size=16", "train.steps=20", "train.log_every=1", "teacher.steps=4",
    "loss.alpha_end=0.5",
    "model.text_width=32", "model.text_heads=2", "model.embed_dim=16", "data.scenes.count=3000",
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
) -> subprocess.CompletedProcess[str]:
    """A small run with ds_configs/zero{stage}.json into `output`; stdout and stderr of all ranks together.

    Without `launcher` the ranks are started from here, without its cost and that of the imports (`ranks.prepared`);
    as under the launcher, the first that fails ends the others. mounts: a process whose file systems they see.
    """
    line = ["--ds_config", f"ds_configs/zero{stage}.json", f"output_dir={output}", *SMALL, *arguments]
    if launcher or device != "cpu":
        done = launch(*line, options=("--num_gpus", str(ranks)), env={**os.environ, "DS_ACCELERATOR": device})
    else:
        done = run_script("pretrain", line, ranks, check=False, mounts=mounts)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def losses(folder: Path, name: str = "loss") -> list[float]:
    """That figure of every logged step of a run."""
    return [line[name] for line in read(folder / "metrics.jsonl") if name in line]


def run_script(
    script: str, arguments: list[str], ranks: int = 1, check: bool = True, mounts: int | None = None
) -> subprocess.CompletedProcess[str]:
    """launch/SCRIPT.py on so many ranks, started from here; stdout and stderr of all ranks together."""
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        processes = []
        for rank in range(ranks):
            env = {}
            if ranks > 1:
                env |= {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            processes.append(prepared().Process(target=_run, args=(script, arguments, env, out, err, mounts)))
            processes[-1].start()
        while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes):
            time.sleep(0.05)
        for process in processes:
            process.terminate()
            process.join()
        codes = [process.exitcode for process in processes]
        code = next((code for code in codes if code > 0), codes[0])
        done = subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def _run(
    script: str, arguments: list[str], env: dict[str, str], out: Path, err: Path, mounts: int | None = None
) -> None:
    """In a process of its own: launch/SCRIPT.py as its command line would run it."""
    if mounts is not None:
        with open(f"/proc/{mounts}/ns/mnt") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ |= env
    sys.argv = [f"launch/{script}.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
