"""What pre-training does at a step: targets of teacher and momentum model, the three losses, records of the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sacl_ds.config import RunConfig
from sacl_ds.data.ahead import ahead
from sacl_ds.data.batch import Batch
from sacl_ds.distributed import same_error
from sacl_ds.model.momentum import Momentum
from sacl_ds.model.teacher import Teacher, teacher_features
from sacl_ds.telemetry.weight_records import WeightRecords
from sacl_ds.training.accumulation import Beside, Met, contrastive_step
from sacl_ds.training.cautions import Cautions
from sacl_ds.training.engine import forget_order, whole_parameters
from sacl_ds.training.momentum_targets import momentum_outputs, momentum_targets
from sacl_ds.training.objectives import Targets, step_regulation
from sacl_ds.training.records import is_recorded, step_record
from sacl_ds.training.schedules import alpha, soft_weight
from sacl_ds.training.step import Step


@dataclass
class PretrainWork:
    """A `Work` of the loop. `records` is None on every rank but the first."""

    run: RunConfig
    teacher: Teacher | None
    momentum: Momentum | None
    epoch_pairs: int  # of the data, once through
    records: WeightRecords | None
    rows: str = "pairs"
    _met: Met | None = field(default=None, init=False)  # in the step that goes on

    def __post_init__(self) -> None:
        self._cautions = Cautions(self.run)

    def backward(self, engine: DeepSpeedEngine, batch: Batch, step: Step) -> dict[str, Tensor]:
        self._met = contrastive_step(engine, batch, step, _Aims(self, step))
        return self._met.losses

    def after(self, engine: DeepSpeedEngine, batch: Batch, step: Step) -> str | None:
        assert self._met is not None
        targets, met, self._met = self._met.targets, self._met, None
        believed = targets.momentum
        if self.momentum and believed:
            self.momentum.update(whole_parameters(engine, engine.module.model))
            self.momentum.push(believed.keys.image, believed.keys.text, batch.pair_ids, targets.teacher)
        if met.features is None:
            return None
        regulation = step_regulation(self.run.loss, targets)[0]
        lowest = self.run.records.lowest
        rows = step_record(met.features, targets.teacher, regulation, met.losses, batch, lowest)
        with same_error():
            if self.records:
                self.records.write(step.number + 1, *rows)
        return self._cautions.of_weights(step.number + 1, regulation.alpha, rows[0])

    def suspects(self, engine: DeepSpeedEngine, batch: Batch, step: Step) -> Tensor:
        parts = ahead(batch.parts(step.rows), step.device) if len(batch) > step.rows else [batch]
        found = []
        with torch.no_grad():
            for part in parts:
                image, text, _ = engine(part, None)
                forget_order(engine)
                found.append(~(image.isfinite().all(1) & text.isfinite().all(1)))
        return torch.cat(found)

    def names(self, batch: Batch) -> list[str]:
        return [f"{shard}:{key}" if shard else key for shard, key in zip(batch.shards, batch.keys, strict=True)]

    def figures(self, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.teacher:
            found["alpha"] = alpha(step, self.run)
        if self.momentum:
            found["momentum_weight"] = soft_weight(step, self.run, self.epoch_pairs)
            found["queue_fill"] = self.momentum.fill
        return found

    def caution(self, done: int, figures: dict[str, Any]) -> str | None:
        return self._cautions.of_scale(done, figures.get("alpha", 0.0), figures["logit_scale"])


@dataclass(frozen=True)
class _Aims:
    """Of one step."""

    work: PretrainWork
    step: Step

    def beside(self, batch: Batch, features: bool, tokens: bool) -> Beside:
        work, run = self.work, self.work.run
        teacher = None
        if work.teacher and features:
            teacher = teacher_features(work.teacher, batch, run.train.precision)
        tokens = tokens and self._soft_weight > 0 and run.loss.mlm_weight > 0
        if work.momentum is None or not (features or tokens):
            return Beside(teacher)
        return Beside(teacher, *momentum_outputs(work.momentum, batch, run, tokens))

    def targets(self, beside: Beside) -> Targets:
        work, run, step = self.work, self.work.run, self.step
        recorded = is_recorded(step.number + 1, run.train.steps, run.records)
        believed = None
        if work.momentum and beside.momentum:
            believed = momentum_targets(work.momentum, run, beside.momentum, self._soft_weight, beside.token_logits)
        share = alpha(step.number, run) if beside.teacher else 0.0
        return Targets(beside.teacher, share, step.generator, step.logged or recorded, recorded, believed, even=True)

    @property
    def _soft_weight(self) -> float:
        return soft_weight(self.step.number, self.work.run, self.work.epoch_pairs) if self.work.momentum else 0.0
