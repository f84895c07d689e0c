"""A small all-reduce over all ranks: `deepspeed [--hostfile hosts] --no_local_rank --module sacl_ds.doctor.bandwidth`.

Each rank finds the others by the launcher's variables; the first prints one line of JSON behind `MARK`.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist

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
