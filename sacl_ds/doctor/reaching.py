"""Access to the nodes over ssh, as pdsh reaches them, and to DeepSpeed's launcher for the all-reduce."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from sacl_ds.doctor.comparison import AllReduce, Contact
from sacl_ds.doctor.facts import Facts, Request, travelling

MARK = "sacl_ds all-reduce: "
SECONDS = 60.0  # until the ranks have met
_ROUNDS = 7
_BYTES = {"nccl": 256_000_000, "gloo": 16_000_000}


def measure() -> dict[str, float | int | str] | None:
    """Measure the all-reduce; all ranks call it. The first returns ranks, megabytes, GB/s of a rank (both ways alike).

    Raises RuntimeError where the sum is not that of all ranks, or ranks do not meet in time.
    """
    cuda = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=SECONDS))
    world, rank = dist.get_world_size(), dist.get_rank()
    values = torch.empty(_BYTES[backend] // 4, device=device)
    seconds = []
    for _ in range(_ROUNDS):
        values.fill_(float(rank + 1))
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        expected = world * (world + 1) / 2
        if not bool((values == expected).all()):
            raise RuntimeError(f"rank {rank}: an all-reduce gave {values.min().item()}, not {expected}")
    size = values.numel() * values.element_size()
    took = statistics.median(seconds[2:])  # the first ones set up connections
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        return None
    sent = 2 * (world - 1) / world * size
    return {"ranks": world, "megabytes": size / 1e6, "bandwidth": sent / took / 1e9, "backend": backend}


def main() -> None:
    found = measure()
    if found:
        print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()


FACTS = "sacl_ds facts: "  # before a node's JSON: a login script may print lines of its own
_CONNECT, _GATHER, _REDUCE = 10, 180.0, 180.0  # seconds
_AT_ONCE = 64
T = TypeVar("T")


class Unreached(Exception):
    """Raised for a command that failed on a node; the message is its last line."""


def ssh(node: str, command: str, seconds: float) -> str:
    """Run a command line on a node and return its output. Raises Unreached."""
    line = ["ssh", *_arguments(), "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT}", node, command]
    try:
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        raise Unreached("ssh is not installed here") from None
    except subprocess.TimeoutExpired:
        raise Unreached(f"nothing in {seconds:.0f} s") from None
    if done.returncode:
        raise Unreached(_last_line(done.stderr) or f"status {done.returncode}")
    return done.stdout


def contact(node: str) -> Contact:
    """Ask a node whether it answers, and compare its clock with ours."""
    try:
        ssh(node, "true", 2 * _CONNECT)  # the second answer takes less, so that the clock is known better
        sent = time.time()
        said = float(ssh(node, "date +%s.%N", 2 * _CONNECT).split()[-1])
    except (Unreached, ValueError, IndexError) as error:
        return Contact(str(error))
    half = (time.time() - sent) / 2
    return Contact(None, said - (sent + half), half)


def keep_alive(node: str) -> float | None:
    """Return the seconds after which ssh to a node, with pdsh's arguments, gives up a silent peer.

    0 where it never does, None where ssh does not tell.
    """
    try:
        done = subprocess.run(["ssh", *_arguments(), "-G", node], capture_output=True, text=True, timeout=10)
        values = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
        return float(values["serveraliveinterval"]) * (float(values["serveralivecountmax"]) + 1)
    except (OSError, subprocess.TimeoutExpired, KeyError, ValueError):
        return None


def first_address(node: str) -> str:
    """Return the first node's first address, where ranks meet unless --master_addr is given. Raises Unreached."""
    words = ssh(node, "hostname -I", 2 * _CONNECT).split()
    if not words:
        raise Unreached("hostname -I names no address")
    return words[0]


def gather_on(node: str, request: Request) -> Facts:
    """Gather a node's facts there, in the environment in which DeepSpeed's launcher would start a rank. Raises
    Unreached."""
    asked = shlex.quote(json.dumps(dataclasses.asdict(request)))
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in travelling().items())
    python = shlex.quote(sys.executable)
    said = ssh(node, f"{exports}cd {shlex.quote(os.getcwd())} && {python} -m sacl_ds.doctor --node {asked}", _GATHER)
    lines = [line.removeprefix(FACTS) for line in said.splitlines() if line.startswith(FACTS)]
    if not lines:
        raise Unreached("it printed no facts")
    return Facts(**json.loads(lines[-1]))


def write_token(node: str, folder: str, token: str) -> None:
    """Raises Unreached."""
    path = shlex.quote(str(Path(folder, token)))
    ssh(node, f"mkdir -p {shlex.quote(folder)} && : > {path}", 2 * _CONNECT)


def remove_token(node: str, folder: str, token: str) -> None:
    ssh(node, f"rm -f {shlex.quote(str(Path(folder, token)))}", 2 * _CONNECT)


def on_all(nodes: Iterable[str], work: Callable[[str], T]) -> dict[str, T]:
    """Apply work(node) to all nodes at once."""
    nodes = list(nodes)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(nodes, pool.map(work, nodes), strict=True))


def all_reduce(options: list[str]) -> AllReduce:
    """Run the all-reduce by DeepSpeed's launcher. options: the launcher's."""
    launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if launcher is None:
        return AllReduce("deepspeed's launcher is not on PATH")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    own = ["--no_local_rank", "--master_port", str(port), "--module", "sacl_ds.doctor.reaching"]
    process = subprocess.Popen(
        [launcher, *options, *own],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=_REDUCE)
    except subprocess.TimeoutExpired:
        # not SIGTERM, on which DeepSpeed's launcher ends all that it ever started on the nodes, a training among it;
        # ranks that wait for each other end by themselves
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return AllReduce(f"nothing in {_REDUCE:.0f} s; the last line: {_last_line(said)}")
    lines = [line.partition(MARK)[2] for line in said.splitlines() if MARK in line]
    if lines:
        return AllReduce(None, **json.loads(lines[-1]))
    return AllReduce(_cause(said) or f"status {process.returncode}")


def _arguments() -> list[str]:
    """Return the extra ssh arguments that pdsh adds."""
    return shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))


def _cause(text: str) -> str:
    """Return the first line that names an error, else the last one."""
    named = [line for line in text.splitlines() if "Error" in line and "ChildFailed" not in line]
    return named[0].strip()[:300] if named else _last_line(text)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
