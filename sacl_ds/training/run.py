"""Run of a training from its directory to its last checkpoint, for pre-training and fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from sacl_ds.config import TrainingConfig
from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.sources import MISSING
from sacl_ds.distributed import barrier, broadcast_object, raise_on_all_ranks, rank, world_size
from sacl_ds.ds_config import EngineConfig, resolve, zero_stage
from sacl_ds.faults.guard import Guard, guarding
from sacl_ds.machine import Machine
from sacl_ds.telemetry.progress import RunProgress
from sacl_ds.telemetry.records import FOLDER as WEIGHT_RECORDS
from sacl_ds.telemetry.records import METRICS, MetricLog
from sacl_ds.training.checkpoint_folder import latest
from sacl_ds.training.engine import build_engine, cores, local_ranks, ranks
from sacl_ds.training.health import BAD_STEPS
from sacl_ds.training.loop import Loop
from sacl_ds.training.run_folder import limits, newest, open_run_folder, require_shared
from sacl_ds.training.schedules import changed_schedules
from sacl_ds.training.task import Figures, Training

START = "start.txt"  # what the model started from
# what a run writes as it goes and a command reads: sealed when it is finished
RECORDS = (METRICS, BAD_STEPS, WEIGHT_RECORDS, MISSING)

Run = TypeVar("Run", bound=TrainingConfig)


@dataclass(frozen=True)
class Job:
    """Execution of a training, beside its configuration. ds: DeepSpeed's file; resume: go on in its directory."""

    ds: dict[str, Any]
    ds_name: str
    device: torch.device
    machine: Machine
    resume: bool

    def engine_config(self, run: TrainingConfig, folder: Path) -> EngineConfig:
        return resolve(self.ds, run, world_size(), self.machine, name=self.ds_name, folder=str(folder))

    def resumes(self, folder: Path) -> bool:
        """Return whether this start continues from a checkpoint in `folder`.

        All ranks return the same, though nodes may not see the same files at once.
        """
        there = self.resume and latest(folder) is not None
        return bool(broadcast_object(there))

    def workers(self, asked: int | None) -> int:
        """Return the loader processes of a rank: `asked`, or what suits the cores.

        On a CPU with two cores a rank, a loader process only stalls the maths.
        """
        if asked is not None:
            return asked
        on_cpu = self.machine.on_cpu
        spare = cores() // local_ranks() - (2 if on_cpu else 1)
        return min(8, max(0 if on_cpu else 1, spare))


@contextmanager
def opened(
    run: Run, job: Job, settle: Callable[[Run, Path], Run] = lambda run, folder: run
) -> Iterator[tuple[Run, Path, Guard]]:
    """Open a run: yields its settled configuration, its directory, made and locked, and the guard of its ranks.

    Every rank enters it. settle: completes the configuration from what the directory holds; called on the first rank.
    Raises UserError, the same on every rank.
    """
    lock = settled = None
    with raise_on_all_ranks():
        plan = job.engine_config(run, Path(run.output_dir or "."))
        if rank() == 0:
            folder, lock = open_run_folder(run, job.resume)
            settled = settle(run, folder), folder
    run, folder = broadcast_object(settled)
    if rank() == 0:
        print(_plan_lines(job, plan), flush=True)
    require_shared(folder)
    with raise_on_all_ranks():
        checkpointed = newest(folder)
    with guarding(folder, ranks(), limits(run), checkpointed) as guard:
        yield run, folder, guard
    if lock:
        lock.close()


def train(training: Training, job: Job, guard: Guard, progress: RunProgress, resume: bool) -> Figures:
    """Build the engine, load the checkpoint where `resume`, train to the end; returns the last evaluation.

    Raises UserError, the same on every rank, and Stopped where the run was asked to stop.
    """
    run, folder, task, workers = training.run, training.folder, training.task, job.workers(training.workers)
    engine = build_engine(training.objective, training.engine_config, run.optim)
    start, resumed = 0, None
    with raise_on_all_ranks():
        if resume:
            from sacl_ds.training import checkpoint

            resumed = checkpoint.resume(engine, folder, training.identity, task.momentum, training.id_columns)
            start = resumed.state.step
        task.begin(engine, start if resume else None)
    guard.begin(start if resume else None)
    loader = BatchLoader(
        training.source,
        training.order,
        training.collator,
        rank=rank(),
        world=world_size(),
        workers=workers,
        start_step=start,
        pin_memory=not job.machine.on_cpu,
    )
    log = MetricLog(folder / METRICS, start if resume else None) if rank() == 0 else None
    loop = Loop(training, engine, iter(loader), job.device, log, progress, guard)
    if resumed:
        changed = changed_schedules(resumed.state.schedules, loop.schedules(start))
        for note in [*resumed.notes, *changed]:
            progress.print(f"warning: --resume: {note}")
    try:
        result = loop.train(start)
    finally:
        progress.close()
        loader.close()
    if speed := loop.throughput.summary():
        progress.print(f"{progress.title}: {speed}")
    guard.at(run.train.steps, "ending")
    task.finish(engine)
    engine.destroy()
    barrier()
    return result


def _plan_lines(job: Job, plan: EngineConfig) -> str:
    """Return a line on what trains, and one for each setting that costs speed."""
    half = {"bfloat16": "bf16 autocast", "float16": "fp16 autocast"}
    precision = half.get(plan.values.get("torch_autocast", {}).get("dtype"), "fp32")
    where = f"{world_size()} rank{'s' if world_size() > 1 else ''} on {job.machine.device_name}"
    line = f"{where}, ZeRO {zero_stage(plan.values)}, {precision}, AdamW of {plan.adam}"
    if plan.adam == "DeepSpeed":
        line += " (compiled at its first use, which takes minutes)"
    if job.machine.cannot_compile:
        line += f"; {job.machine.cannot_compile} here, so DeepSpeed's own operators stay off"
    return "\n".join([line, *(f"note: {note}" for note in plan.notes)])
