"""The training loop: targets, losses, backward, update, record."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import Batch, duplicates
from sacl_ds.distributed import gather_rows, rank, row_counts, same_error, sum_over_ranks, world_size
from sacl_ds.errors import UserError
from sacl_ds.model.momentum import Momentum
from sacl_ds.model.teacher import Teacher, teacher_features
from sacl_ds.telemetry.metrics import MetricLog
from sacl_ds.telemetry.progress import RunProgress
from sacl_ds.telemetry.weight_records import WeightRecords
from sacl_ds.training import checkpoint
from sacl_ds.training.cautions import Cautions
from sacl_ds.training.engine import set_learning_rates, whole_parameters
from sacl_ds.training.ledger import Ledger
from sacl_ds.training.momentum_targets import momentum_targets
from sacl_ds.training.objectives import Targets, step_regulation
from sacl_ds.training.records import StepWeights, is_recorded
from sacl_ds.training.schedules import alpha, learning_rate_factor, soft_weight

Evaluate = Callable[[int], dict[str, tuple[float, float]]]  # steps done -> {name: (value, chance)}


@dataclass
class Loop:
    """One phase of training. `log` and `records` are None on every rank but the first."""

    run: RunConfig
    folder: Path
    identity: checkpoint.Identity  # kept with checkpoints
    engine: DeepSpeedEngine
    batches: Iterator[Batch]
    device: torch.device
    teacher: Teacher | None
    momentum: Momentum | None
    epoch_pairs: int  # of the data, once through
    evaluate: Evaluate | None
    log: MetricLog | None
    records: WeightRecords | None
    progress: RunProgress

    def __post_init__(self) -> None:
        self.cautions = Cautions(self.run)

    def train(self, start: int) -> dict[str, tuple[float, float]]:
        """Steps `start` to train.steps, then a checkpoint; returns the last evaluation ({} where there is none)."""
        train = self.run.train
        result: dict[str, tuple[float, float]] = {}
        clock, since, waited = time.perf_counter(), start, 0.0
        ledger = Ledger(train.global_batch_size, self.run.data.max_bad_share, self.device)
        self.engine.train()
        for step in range(start, train.steps):
            before = time.perf_counter()
            batch = next(self.batches).to(self.device)
            waited += time.perf_counter() - before
            ledger.add(batch.faults)
            done = step + 1
            logged = done % train.log_every == 0 or done == train.steps or step == start
            recorded = is_recorded(done, train.steps, self.run.records)
            losses, weights = self._step(step, batch, logged, recorded)
            self.progress.advance(done)
            if weights is not None:
                self._record_weights(done, weights, batch)
            if logged:
                now = time.perf_counter()
                data = self._account(done, batch, ledger)
                self._record(done, losses, data, (now - clock) / (done - since), waited / max(now - clock, 1e-9))
                clock, since, waited = time.perf_counter(), done, 0.0
            if _due(done, train.eval_every) or done == train.steps:
                result = self._evaluate(done)
                clock = time.perf_counter()
            if _due(done, train.save_every) or done == train.steps:
                checkpoint.save(self.engine, self.folder, done, self.identity, self.momentum)
                clock = time.perf_counter()
        return result

    def _step(
        self, step: int, batch: Batch, logged: bool, recorded: bool
    ) -> tuple[dict[str, Tensor], StepWeights | None]:
        """Its losses, and what a record needs where one is due."""
        run = self.run
        # what is random in a step follows from (seed, step, rank): a resumed run needs no random state
        seed = _mix(run.seed, step, rank())
        torch.manual_seed(seed)
        generator = torch.Generator(device=self.device).manual_seed(seed)
        set_learning_rates(self.engine, run.optim, learning_rate_factor(step, run.train.steps, run.optim))
        teacher = teacher_features(self.teacher, batch) if self.teacher else None
        share = alpha(step, run) if teacher else 0.0
        weights = None
        try:
            believed = None
            if self.momentum:
                believed = momentum_targets(self.momentum, batch, run, soft_weight(step, run, self.epoch_pairs))
            targets = Targets(teacher, share, generator, logged or recorded, recorded, believed)
            losses = self.engine(batch, targets)
            if recorded:
                losses, features = losses
                weights = StepWeights(features, teacher, step_regulation(run.loss, targets)[0], losses)
            self.engine.backward(losses["loss"])
            self.engine.step()
            if self.momentum and believed:
                self.momentum.update(whole_parameters(self.engine, self.engine.module.model))
                self.momentum.push(believed.keys.image, believed.keys.text, batch.pair_ids, teacher)
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory(run, step, len(batch), world_size(), error)) from None
        return losses, weights

    def _record_weights(self, done: int, weights: StepWeights, batch: Batch) -> None:
        """Every rank takes part, the first writes."""
        figures, lowest = weights.record(batch, self.run.records.lowest)
        with same_error():
            if self.records:
                self.records.write(done, figures, lowest)
        self._caution(done, self.cautions.of_weights(done, weights.regulation.alpha, figures))

    def _caution(self, done: int, line: str | None) -> None:
        if line is not None:
            self.progress.print(f"warning: {line}")
            if self.log:
                self.log.write({"step": done, "caution": line})

    def _account(self, done: int, batch: Batch, ledger: Ledger) -> dict[str, int | str]:
        """What the data of this step and of those since the last one were like; the same on all ranks.

        `batch_digest` is equal for equal global batches: of runs that were resumed, or had other ranks or workers.
        """
        settled = ledger.settle()
        for note in settled.notes:
            self.progress.print(note)
        if self.log and settled.faults:
            self.log.write({"step": done, "faults": settled.faults})
        ids = gather_rows(batch.pair_ids, row_counts(batch.pair_ids))
        digest = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]
        return {**settled.figures, "duplicate_pairs": duplicates(ids), "batch_digest": digest}

    def _record(
        self, done: int, losses: dict[str, Tensor], data: dict[str, int | str], step_seconds: float, waited: float
    ) -> None:
        """Means over ranks of the step's losses, and where the run stands."""
        names = list(losses)
        means = sum_over_ranks(torch.stack([losses[name].detach().double() for name in names])) / world_size()
        run, optim = self.run, self.run.optim
        factor = learning_rate_factor(done - 1, run.train.steps, optim)
        norm = self.engine.get_global_grad_norm()
        figures: dict[str, Any] = {
            "step": done,
            **dict(zip(names, means.tolist(), strict=True)),
            "lr_image": factor * optim.lr_image,
            "lr_text": factor * optim.lr_text,
            "grad_norm": None if norm is None else float(norm),
            "step_seconds": step_seconds,
            "pairs_per_second": run.train.global_batch_size / step_seconds,
            "data_wait_share": waited,
            **data,
        }
        if self.teacher:
            figures["alpha"] = alpha(done - 1, run)
        if self.momentum:
            figures["momentum_weight"] = soft_weight(done - 1, run, self.epoch_pairs)
            figures["queue_fill"] = self.momentum.fill
        if self.log:
            self.log.write(figures)
        self._monitor("train", figures, done)
        self.progress.update(done, figures, (run.train.steps - done) * step_seconds)
        self._caution(done, self.cautions.of_scale(done, figures.get("alpha", 0.0), figures["logit_scale"]))

    def _evaluate(self, done: int) -> dict[str, tuple[float, float]]:
        if self.evaluate is None:
            return {}
        figures = self.evaluate(done)
        if self.log:
            values = {name: value for name, (value, _) in figures.items()}
            chances = {name: chance for name, (_, chance) in figures.items()}
            self.log.write({"step": done, "evaluation": values, "chance": chances})
        self._monitor("evaluation", {name: value for name, (value, _) in figures.items()}, done)
        return figures

    def _monitor(self, room: str, figures: dict[str, Any], done: int) -> None:
        """To DeepSpeed's monitors (TensorBoard, wandb, CSV), where its configuration enables one."""
        if self.engine.monitor.enabled:
            numbers = [(name, value) for name, value in figures.items() if isinstance(value, float)]
            self.engine.monitor.write_events([(f"{room}/{name}", value, done) for name, value in numbers])


def out_of_memory(run: RunConfig, step: int, pairs: int, world: int, error: BaseException) -> str:
    """What ran out, where, and what lowers it, as one line."""
    advice = [f"train.global_batch_size (now {run.train.global_batch_size})"]
    if run.train.precision == "fp32":
        advice.append("train.precision=bf16")
    advice += [f"more than {world} rank{'s' if world > 1 else ''}", "ds_configs/zero3_offload.json"]
    reason = ". ".join(str(error).split(". ")[:2])
    return f"out of GPU memory at step {step} with {pairs} pairs a rank ({reason}); try a lower {', or '.join(advice)}"


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _mix(seed: int, step: int, rank: int) -> int:
    """Different for every (seed, step, rank) a run can have, and below 2^63."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63)
