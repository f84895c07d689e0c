"""Time steps in alternating rounds, and measure the memory of one of them in a fresh process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sacl_ds.distributed import barrier, max_over_ranks
from step_benchmark.ours import Step

_STATUS = Path("/proc/self/status")


def seconds_of(
    steps: Mapping[str, Step], rounds: int, warm_up: int, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a step, of each round; of the slowest rank.

    A round takes `repeats` steps of each in a row, forwards through them and backwards in turn, so that a machine that
    slows down meets all alike. Each has had `warm_up` steps before.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in reversed(list(steps)) if turn % 2 else list(steps):
            _wait(device)
            barrier()
            started = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            _wait(device)
            taken[name].append((time.perf_counter() - started) / repeats)
    slowest = max_over_ranks(torch.tensor([taken[name] for name in steps], device=device))
    return dict(zip(steps, slowest.tolist(), strict=True))


def peak_bytes(build: Callable[[], Step], device: torch.device, steps: int = 2) -> float | None:
    """Parameters, optimizer and all that a step holds at its peak; None where the system does not say.

    On a CPU: what the process grows by over what it held before the model; to be asked in a fresh process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif not _STATUS.exists():
        return None
    else:
        before = _status("VmRSS")
    step = build()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return float(line.split()[1]) * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
