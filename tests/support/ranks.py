"""Real processes for tests.

They are forked from a server that has imported what takes seconds (torch, deepspeed, transformers) and done nothing
else: every test gets fresh processes, and none pays for the imports again.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prepared() -> multiprocessing.context.ForkServerContext:
    """Where processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    return context


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Run work(rank, *arguments) on `world` processes in one gloo group; raises what any of them raised."""
    prepared()
    torch.multiprocessing.start_processes(
        _enter, (world, free_port(), work, arguments), nprocs=world, start_method="forkserver"
    )


def _enter(rank: int, world: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
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
