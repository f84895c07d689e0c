"""Fresh processes of one job on this machine, over gloo, for tools that measure."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_IMPORTED = ["sacl_ds.training.pretrain", "deepspeed"]  # once for all processes, which takes seconds


def on_ranks(world: int, work: Callable[[int, Any], Any], argument: Any) -> list[Any]:
    """Run work(rank, argument) in `world` processes; returns their results by way of JSON, None of one that failed.

    work: of a module that can be imported; it finds the launcher's variables in its environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        told = [(rank, world, port, Path(folder, f"{rank}.json"), work, argument) for rank in range(world)]
        ranks = [context.Process(target=_enter, args=each) for each in told]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        for process in ranks:
            if process.exitcode:
                print(f"{process.name} ended with status {process.exitcode}", file=sys.stderr)
        return [json.loads(each[3].read_text()) if each[3].exists() else None for each in told]


def _enter(rank: int, world: int, port: int, result: Path, work: Callable[[int, Any], Any], argument: Any) -> None:
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    made = json.dumps(work(rank, argument))
    result.write_text(made)
