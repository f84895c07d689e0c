"""Training loop: batches in, steps, and the logs, evaluations and checkpoints between them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from sacl_ds.config import TrainingConfig
from sacl_ds.data.batch import ahead, duplicates
from sacl_ds.data.loader import Loadable
from sacl_ds.distributed import gather_rows, max_over_ranks, rank, row_counts, sum_over_ranks, world_size
from sacl_ds.errors import Fault, SharedError, Stopped, UserError, nearest
from sacl_ds.faults.guard import Guard
from sacl_ds.telemetry.progress import RunProgress
from sacl_ds.telemetry.records import MetricLog
from sacl_ds.telemetry.throughput import Throughput, device_peak, take_memory_peak
from sacl_ds.training.checkpoint_folder import Retention, Standing, figures_of
from sacl_ds.training.engine import set_learning_rates
from sacl_ds.training.health import BadSteps, Ledger, Stops
from sacl_ds.training.schedules import learning_rate_factor
from sacl_ds.training.step import Losses, Step
from sacl_ds.training.task import Figures, Training


@dataclass
class Loop:
    """Loop over the steps of one training. `log` is None on every rank but the first."""

    training: Training
    engine: DeepSpeedEngine
    batches: Iterator[Loadable]
    device: torch.device
    log: MetricLog | None
    progress: RunProgress
    guard: Guard

    def __post_init__(self) -> None:
        training = self.training
        self.run, self.task = training.run, training.task
        peak = device_peak(self.device, self.run.train.precision)
        self.throughput = Throughput(self.task.rows, self.device, world_size(), None, peak)
        self.stops = Stops(self.device)
        self.rows, self.passes = self.run.micro_batches(world_size())

    def train(self, start: int) -> Figures:
        """Train from step `start` to train.steps, then save; returns the last evaluation ({} where there is none).

        Raises Stopped after a checkpoint where this rank or another was asked to stop.
        """
        try:
            return self._train(start)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):  # raised wherever this process was when it ended
                raise
            lost = " ".join(str(error).split(". ")[0].split())
            raise Fault(f"{lost}; a loader process of rank {rank()} was killed, or ran out of memory") from None

    def _train(self, start: int) -> Figures:
        train = self.run.train
        self.bad_steps = BadSteps(self.training.folder, train.max_bad_steps, start if start else None)
        result: Figures = {}
        clock, since, waited = time.perf_counter(), start, 0.0
        ledger = Ledger(train.global_batch_size, self.training.max_bad_share, self.device)
        batches = self._arriving()
        self.engine.train()
        for step in range(start, train.steps):
            before = time.perf_counter()
            first = step == start  # in which loaders begin and kernels are built
            self.guard.at(step, "starting" if first else "data")
            batch = self._next(batches, step)
            self.guard.at(step, "starting" if first else "step")
            waited += time.perf_counter() - before
            ledger.add(batch.faults)
            if self.training.row_flops:
                self.throughput.add(batch.attention_mask)
            done = step + 1
            logged = done % train.log_every == 0 or done == train.steps or step == start
            losses = self._step(step, batch, logged)
            self.progress.advance(done)
            if logged:
                speed = self._speed(done, done - since, clock, waited)
                self._record(done, losses, self._account(done, batch, ledger), speed)
                clock, since, waited = time.perf_counter(), done, 0.0
            between = _due(done, train.eval_every) or _due(done, train.save_every)
            if between and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the steps that are queued are no part of what follows
            before = time.perf_counter()
            judged = _due(done, train.eval_every) or done == train.steps
            if judged:
                self.guard.at(done, "evaluation")
                try:
                    result = self._evaluate(done)
                except SharedError as error:  # such as features that are not finite
                    self._save(done, {}, Retention())
                    raise SharedError(f"{error}; the checkpoint of step {done} is kept, and all before it") from None
            stop = self.stops.agreed(done, self.guard.requests.reason is not None)
            if _due(done, train.save_every) or done == train.steps or stop:
                self._save(done, result if judged else {})
            if stop and done < train.steps:
                raise Stopped(f"stopped by {self.guard.requests.reason or 'another rank'} after step {done}")
            clock += time.perf_counter() - before  # neither is part of a step
        return result

    def schedules(self, done: int) -> dict[str, float]:
        """Return the schedules' values in the last of `done` steps."""
        optim = self.run.optim
        factor = learning_rate_factor(done - 1, self.run.train.steps, optim)
        rates = {"lr_image": factor * optim.lr_image, "lr_text": factor * optim.lr_text}
        return rates | self.task.schedules(done - 1)

    def _save(self, done: int, judged: Figures, keep: Retention | None = None) -> None:
        """Save a checkpoint. judged: held-out metrics of this step. keep: None: as the run has it."""
        keep = keep or Retention.of(self.run.train)
        if judged and keep.best and keep.best not in judged:
            like = nearest(keep.best, judged) or next(iter(judged))
            raise UserError(f"train.keep_best={keep.best}: no such held-out figure; there is {like}")
        self.guard.at(done, "saving")
        from sacl_ds.training import checkpoint  # no run needs it before its first one

        standing = Standing(self.schedules(done), figures_of(judged))
        folder, identity = self.training.folder, self.training.identity
        checkpoint.save(self.engine, folder, done, identity, self.task.momentum, keep, standing)
        self.guard.saved(done)

    def _arriving(self) -> Iterator[Any]:
        """Yield batches on the device; of those with several micro-batches only the rows' ids are."""
        if self.passes == 1:
            return ahead(self.batches, self.device)
        return (replace(batch, pair_ids=batch.pair_ids.to(self.device)) for batch in self.batches)  # type: ignore[type-var]

    def _next(self, batches: Iterator[Any], number: int) -> Any:
        try:
            return next(batches)
        except torch.OutOfMemoryError as error:  # of the batch after it, which is copied ahead
            raise self._out_of_memory(number, error) from None
        except (ConnectionError, EOFError) as error:  # of a loader that is gone while its tensors are fetched
            lost = f"the connection to a loader broke ({type(error).__name__})"
            raise Fault(f"{lost}; a loader process of rank {rank()} was killed, or ran out of memory") from None

    def _out_of_memory(self, number: int, error: BaseException) -> UserError:
        return UserError(out_of_memory(self.run, number, self.rows, world_size(), error, self.task.rows))

    def _step(self, number: int, batch: Any, logged: bool) -> Losses:
        run = self.run
        # what is random in a step follows from (seed, step, rank): a resumed run needs no random state
        seed = _mix(run.seed, number, rank())
        torch.manual_seed(seed)
        generator = torch.Generator(device=self.device).manual_seed(seed)
        step = Step(number, seed, generator, self.device, self.rows, run.train.coalesce_reduction, logged)
        set_learning_rates(self.engine, run.optim, learning_rate_factor(number, run.train.steps, run.optim))
        try:
            losses, not_finite, caution = self.task.step(self.engine, batch, step)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(number, error) from None
        if not_finite is not None:
            caution = self.bad_steps.add(number + 1, losses, self.task.names(batch), not_finite)
        self._caution(number + 1, caution)
        return losses

    def _caution(self, done: int, line: str | None) -> None:
        if line is not None:
            self.progress.print(f"warning: {line}")
            if self.log:
                self.log.write({"step": done, "caution": line})

    def _account(self, done: int, batch: Loadable, ledger: Ledger) -> dict[str, int | str]:
        """Describe the data of this step and of those since the last logged one; the same on all ranks.

        `batch_digest` is equal for equal global batches: of runs that were resumed, or had other ranks or workers.
        """
        settled = ledger.settle()
        for note in settled.notes:
            self.progress.print(note)
        if self.log and settled.faults:
            self.log.write({"step": done, "faults": settled.faults})
        ids = gather_rows(batch.pair_ids, row_counts(batch.pair_ids))
        digest = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]
        return {**settled.figures, f"duplicate_{self.task.rows}": duplicates(ids), "batch_digest": digest}

    def _speed(self, done: int, steps: int, clock: float, waited: float) -> dict[str, float]:
        """Measure the steps since the last logged one, begun at `clock`; all but the time is the same on all ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else the clock stops while steps are still queued
        seconds = max(time.perf_counter() - clock, 1e-9)
        throughput, batch = self.throughput, self.run.train.global_batch_size
        if self.training.row_flops:
            throughput.flops = self.training.row_flops()
        figures = throughput.settle(done, steps, seconds, batch, sum_over_ranks(throughput.lengths()))
        peak = torch.tensor([take_memory_peak(self.device)], dtype=torch.float64, device=self.device)
        self.stops.pace(seconds / max(steps, 1))
        throughput.more({"memory_peak_bytes": max_over_ranks(peak).item(), "data_wait_share": waited / seconds})
        return figures

    def _record(self, done: int, losses: Losses, data: dict[str, int | str], speed: dict[str, float]) -> None:
        """Average the step's losses over ranks, and add where the run stands."""
        names = list(losses)
        means = sum_over_ranks(torch.stack([losses[name].detach().double() for name in names])) / world_size()
        run = self.run
        norm = self.engine.get_global_grad_norm()
        figures: dict[str, Any] = {
            "step": done,
            **dict(zip(names, means.tolist(), strict=True)),
            "grad_norm": None if norm is None else float(norm),
            **speed,
            **data,
            "skipped_steps": self.bad_steps.count,
            **self.schedules(done),
        }
        if self.log:
            self.log.write(figures)
        self._monitor("train", figures, done)
        self.progress.update(done, figures, (run.train.steps - done) * speed["step_seconds"])
        self._caution(done, self.task.caution(done, figures))

    def _evaluate(self, done: int) -> Figures:
        figures = self.task.evaluate(done)
        if not figures:
            return figures
        if self.log:
            values = {name: value for name, (value, _) in figures.items()}
            chances = {name: chance for name, (_, chance) in figures.items()}
            self.log.write({"step": done, "evaluation": values, "chance": chances})
        self._monitor("evaluation", {name: value for name, (value, _) in figures.items()}, done)
        return figures

    def _monitor(self, room: str, figures: dict[str, Any], done: int) -> None:
        """Send metrics to DeepSpeed's monitors (TensorBoard, wandb, CSV), where its configuration enables one."""
        if self.engine.monitor.enabled:
            numbers = [(name, value) for name, value in figures.items() if isinstance(value, float)]
            self.engine.monitor.write_events([(f"{room}/{name}", value, done) for name, value in numbers])


def out_of_memory(
    run: TrainingConfig, step: int, count: int, world: int, error: BaseException, rows: str = "pairs"
) -> str:
    """Return one line that says what ran out, where, and what lowers it."""
    fitting = [size for size in range(2, count // 2 + 1) if count % size == 0]
    advice = [f"train.micro_batch_size={size}, which keeps the batch as it is" for size in fitting[-1:]]
    if run.train.precision == "fp32":
        advice.append("train.precision=bf16")
    advice += [f"more than {world} rank{'s' if world > 1 else ''}", "ds_configs/zero3_offload.json"]
    reason = ". ".join(str(error).split(". ")[:2])
    return f"out of GPU memory at step {step} with {count} {rows} at once ({reason}); try {', or '.join(advice)}"


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _mix(seed: int, step: int, rank: int) -> int:
    """Return a seed below 2^63 that differs for every (seed, step, rank) of a run."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63)
