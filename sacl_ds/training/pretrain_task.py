"""Pre-training as a task: its steps with the records of their weights, and the frozen models they compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import Batch
from sacl_ds.distributed import raise_on_all_ranks, rank
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import WEIGHTS, save_weights, seal_run
from sacl_ds.model.teacher import Teacher
from sacl_ds.telemetry.progress import RunProgress
from sacl_ds.telemetry.records import WeightRecords
from sacl_ds.telemetry.throughput import RowFlops
from sacl_ds.training import schedules
from sacl_ds.training.engine import consolidated_state_dict, whole_parameters
from sacl_ds.training.health import Cautions, optimizer_step
from sacl_ds.training.objective import step_regulation
from sacl_ds.training.run import RECORDS, START
from sacl_ds.training.run_folder import check_space
from sacl_ds.training.step import FrozenModels, Losses, Step, contrastive_step, rows_not_finite
from sacl_ds.training.task import Figures, TrainingTask

if TYPE_CHECKING:
    from sacl_ds.model.starts.report import StartReport


_SPECIAL = 2  # [CLS] and [SEP], which MLM never predicts


@dataclass
class PretrainTask(TrainingTask):
    """Training steps of pre-training, with the records of their weights.

    epoch_pairs: pairs of the data, once through. judge: the figures of the model as it stands; None: nothing held out.
    """

    run: RunConfig
    folder: Path
    frozen: FrozenModels
    epoch_pairs: int
    judge: Callable[[], Figures] | None
    rows: str = "pairs"

    def __post_init__(self) -> None:
        self.momentum = self.frozen.momentum
        self._cautions = Cautions(self.run)

    def begin(self, engine: DeepSpeedEngine, resumed_at: int | None) -> None:
        self._records = WeightRecords(self.folder, resumed_at) if rank() == 0 else None

    def step(self, engine: DeepSpeedEngine, batch: Batch, step: Step) -> tuple[Losses, Tensor | None, str | None]:
        done = step.number + 1
        recorded = schedules.is_recorded(done, self.run.train.steps, self.run.records)
        alpha, soft_weight = self._shares(step.number)
        step = replace(step, alpha=alpha, soft_weight=soft_weight, statistics=step.logged or recorded)
        losses, features, targets = contrastive_step(engine, batch, step, self.frozen)
        if not optimizer_step(engine, losses["loss"]):
            return losses, rows_not_finite(engine, batch, step), None
        if self.momentum and targets.keys:
            self.momentum.update(whole_parameters(engine, engine.module.model))
            self.momentum.push(targets.keys.image, targets.keys.text, batch.pair_ids, targets.teacher)
        if not recorded:
            return losses, None, None
        regulation = step_regulation(self.run.loss, targets)[0]
        lowest = self.run.records.lowest
        from sacl_ds.training.records import step_record

        figures, pairs = step_record(features, targets.teacher, regulation, losses, batch, lowest)
        with raise_on_all_ranks():
            if self._records:
                self._records.write(done, figures, pairs)
        return losses, None, self._cautions.of_weights(done, regulation.alpha, figures)

    def names(self, batch: Batch) -> list[str]:
        return [f"{shard}:{key}" if shard else key for shard, key in zip(batch.shards, batch.keys, strict=True)]

    def schedules(self, step: int) -> dict[str, float]:
        alpha, soft_weight = self._shares(step)
        found = {"alpha": alpha} if self.frozen.teacher else {}
        if self.momentum:
            found |= {"momentum_weight": soft_weight, "queue_fill": self.momentum.fill}
        return found

    def _shares(self, step: int) -> tuple[float, float]:
        """Return the teacher's share of the similarity and the momentum model's of the targets; 0 without one."""
        return (
            schedules.alpha(step, self.run) if self.frozen.teacher else 0.0,
            schedules.soft_weight(step, self.run, self.epoch_pairs) if self.momentum else 0.0,
        )

    def caution(self, done: int, figures: dict[str, Any]) -> str | None:
        return self._cautions.of_scale(done, figures.get("alpha", 0.0), figures["logit_scale"])

    def evaluate(self, done: int) -> Figures:
        return self.judge() if self.judge else {}

    def finish(self, engine: DeepSpeedEngine) -> None:
        weights, steps = consolidated_state_dict(engine, engine.module.model), self.run.train.steps
        with raise_on_all_ranks():
            if rank() == 0:
                try:
                    save_weights(weights, self.folder, steps)
                    seal_run(self.folder, *RECORDS)
                except (OSError, SafetensorError) as error:
                    raise UserError(
                        f"{self.folder / WEIGHTS} cannot be written: {error}; the checkpoint of step {steps} is whole: "
                        "make room, and --resume writes it"
                    ) from None


def frozen_models(run: RunConfig, model: SaclModel, teacher: Teacher | None, device: torch.device) -> FrozenModels:
    """Return the teacher and, if enabled, a momentum model: a copy of the initial model.

    Its queue holds the teacher's features if it is regulated.
    """
    settings, momentum = run.momentum, None
    if settings.enabled:
        from sacl_ds.model.momentum import Momentum

        queued = settings.queue_size > 0 and settings.regulate_queue
        momentum = Momentum(model, settings, device, teacher.identity if teacher and queued else "")
    return FrozenModels(teacher, momentum, run.train.precision)


def announce(run: RunConfig, folder: Path, model: SaclModel, begun: StartReport | None, progress: RunProgress) -> None:
    """Print, before training, the disk's room, what the model starts from, and any leak. Only rank 0 calls it."""
    if warning := _check_space(run, folder, model):
        progress.print(f"warning: {warning}")
    if model.captions_choose:
        progress.print(
            "warning: model.patch_selection.placement=published: each image's patches are chosen by its own caption "
            "before ITC, which can find the pair by what was chosen; retrieval without captions has no such help"
        )
    if begun:
        progress.print(Text(str(begun)))
        (folder / START).write_text(f"{begun}\n")


def _check_space(run: RunConfig, folder: Path, model: SaclModel) -> str | None:
    """Run `check_space` for this run; a teacher's features are taken to be as wide as the model's."""
    parameters = sum(p.numel() for p in model.parameters())
    checkpoints = math.ceil(run.train.steps / run.train.save_every) if run.train.save_every else 1
    beside = 0
    if run.momentum.enabled:
        from sacl_ds.model.momentum import saved_bytes

        width = run.model.embed_dim
        queued = width if run.uses_teacher and run.momentum.regulate_queue else 0
        beside = saved_bytes(run.momentum, parameters, width, queued)
    return check_space(folder, parameters, checkpoints, beside)


def pair_flops(run: RunConfig, vocab_size: int) -> RowFlops | None:
    """Return FLOPs of forward and backward a pair, by its caption's length; None if the image encoder's are unknown."""
    from sacl_ds.model.cost import ModelCost

    try:
        cost = ModelCost(run.model, vocab_size=vocab_size)
    except UserError:
        return None

    def flops(tokens: int) -> float:
        predicted = run.loss.mlm_probability * (tokens - _SPECIAL)
        return cost.with_texts(tokens, predicted).pretraining(run.losses).training_flops

    return RowFlops.through(flops)
