"""What stays the same over all that one start of a command line trains: processes, machine, DeepSpeed's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sacl_ds.config import TrainingConfig
from sacl_ds.distributed import world_size
from sacl_ds.ds_config import EngineConfig, resolve, zero_stage
from sacl_ds.machine import Machine
from sacl_ds.training.engine import cores, local_ranks


@dataclass(frozen=True)
class Job:
    """ds: what DeepSpeed's file holds. resume: go on with what the run directory holds."""

    ds: dict[str, Any]
    ds_name: str
    device: torch.device
    machine: Machine
    resume: bool

    def engine_config(self, run: TrainingConfig, folder: Path) -> EngineConfig:
        return resolve(self.ds, run, world_size(), self.machine, name=self.ds_name, folder=str(folder))

    def workers(self, asked: int | None) -> int:
        """Loader processes of a rank: `asked`, or what suits: on a CPU with two cores a rank, one only stalls
        the maths."""
        if asked is not None:
            return asked
        on_cpu = self.machine.on_cpu
        spare = cores() // local_ranks() - (2 if on_cpu else 1)
        return min(8, max(0 if on_cpu else 1, spare))


def describe_start(job: Job, plan: EngineConfig) -> str:
    """One line on what trains, and one for each thing that is not as it could be."""
    half = {"bfloat16": "bf16 autocast", "float16": "fp16 autocast"}
    precision = half.get(plan.values.get("torch_autocast", {}).get("dtype"), "fp32")
    ranks = f"{world_size()} rank{'s' if world_size() > 1 else ''} on {job.machine.device_name}"
    line = f"{ranks}, ZeRO {zero_stage(plan.values)}, {precision}, AdamW of {plan.adam}"
    if plan.adam == "DeepSpeed":
        line += " (compiled at its first use, which takes minutes)"
    if job.machine.cannot_compile:
        line += f"; {job.machine.cannot_compile} here, so DeepSpeed's own operators stay off"
    return "\n".join([line, *(f"note: {note}" for note in plan.notes)])
