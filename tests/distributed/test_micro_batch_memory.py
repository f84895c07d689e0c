"""Eight micro-batches need the memory of one.

From the second on, what one passes through lies beside the gradient of those before: a whole set of parameters more, as
in any accumulation. Here as at base size activations are some twenty times that.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from ranks import on_ranks

from sacl_ds.config import RunConfig
from sacl_ds.machine import this_machine
from sacl_ds.training.step import Step, contrastive_step

ROWS, PIXELS = 48, 96
MMAP_THRESHOLD, ARENA_MAX = -3, -8  # of mallopt
MOST = 1.15


def run_of(pairs: int) -> RunConfig:
    """All three losses."""
    model = {
        "image_encoder_arguments": {"embed_dim": 192, "depth": 6, "num_heads": 3, "patch_size": 16},
        "image_size": PIXELS, "text_width": 192, "text_heads": 3, "text_layers": 2, "fusion_layers": 2,
        "max_tokens": 12, "dropout": 0.1,
    }  # fmt: skip
    train = {"global_batch_size": pairs, "micro_batch_size": ROWS}
    return RunConfig.model_validate({"model": model, "train": train})


def resident(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return float(line.split()[1]) / 1024


def measuring(rank: int, pairs: int, file: Path) -> None:
    """MiB at the peak of a forward and backward, on top of what a process with model and optimizer holds."""
    from sacl_ds.ds_config import resolve
    from sacl_ds.training.engine import build_engine

    library = ctypes.CDLL(None)  # glibc's: what is freed goes back to the system at once, and threads share one heap
    library.mallopt(MMAP_THRESHOLD, 1 << 16)
    library.mallopt(ARENA_MAX, 1)
    run = run_of(pairs)
    settings = resolve({"zero_optimization": {"stage": 2}}, run, 1, this_machine("cpu"))
    engine = build_engine(tiny.objective(run), settings, run.optim)
    batch = tiny.batch(pairs)[0]
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (pairs, 3, PIXELS, PIXELS), generator=generator, dtype=torch.uint8)
    step = Step(0, 5, generator, torch.device("cpu"), ROWS)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    contrastive_step(engine, replace(batch, images=images), step)
    file.write_text(json.dumps(resident("VmHWM") - before))


@pytest.mark.slow
def test_eight_micro_batches_need_the_memory_of_one(tmp_path: Path) -> None:
    peaks = {}
    for count in (1, 8):
        on_ranks(1, measuring, count * ROWS, tmp_path / f"{count}.json")
        peaks[count] = json.loads((tmp_path / f"{count}.json").read_text())
    print(f"peak of a step on top of the model: {peaks[1]:.1f} MiB, in eight micro-batches {peaks[8]:.1f} MiB")
    assert peaks[1] > 250
    assert peaks[8] < MOST * peaks[1], peaks
