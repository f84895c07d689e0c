"""Real processes for tests.

They are forked from a server that has imported what takes seconds (torch, deepspeed, transformers) and done nothing
else: every test gets fresh processes, and none pays for the imports again.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@cache
def prepared() -> multiprocessing.context.ForkServerContext:
    """Where processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    # the server looks for it in its environment's path alone, and says nothing where it is not found
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Run work(rank, *arguments) on `world` processes in one gloo group; raises what any of them raised."""
    prepared()
    torch.multiprocessing.start_processes(
        _enter, (world, free_port(), work, arguments), nprocs=world, start_method="forkserver"
    )


def _enter(rank: int, world: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    assert "preloaded" in sys.modules
    torch.set_num_threads(1)
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        work(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
