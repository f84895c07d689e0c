"""What pre-training does at a step: targets of teacher and momentum model, the three losses, records of the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import Batch
from sacl_ds.distributed import same_error
from sacl_ds.model.momentum import Momentum
from sacl_ds.model.teacher import Teacher, teacher_features
from sacl_ds.telemetry.weight_records import WeightRecords
from sacl_ds.training.cautions import Cautions
from sacl_ds.training.engine import whole_parameters
from sacl_ds.training.momentum_targets import momentum_targets
from sacl_ds.training.objectives import Targets, step_regulation
from sacl_ds.training.records import StepWeights, is_recorded
from sacl_ds.training.schedules import alpha, soft_weight


@dataclass
class PretrainWork:
    """A `Work` of the loop. `records` is None on every rank but the first."""

    run: RunConfig
    teacher: Teacher | None
    momentum: Momentum | None
    epoch_pairs: int  # of the data, once through
    records: WeightRecords | None
    rows: str = "pairs"
    _targets: Targets | None = field(default=None, init=False)  # of the step that goes on
    _weights: StepWeights | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._cautions = Cautions(self.run)

    def losses(
        self, engine: DeepSpeedEngine, step: int, batch: Batch, generator: torch.Generator, logged: bool
    ) -> dict[str, Tensor]:
        run = self.run
        recorded = is_recorded(step + 1, run.train.steps, run.records)
        teacher = teacher_features(self.teacher, batch) if self.teacher else None
        believed = None
        if self.momentum:
            believed = momentum_targets(self.momentum, batch, run, soft_weight(step, run, self.epoch_pairs))
        share = alpha(step, run) if teacher else 0.0
        self._targets = Targets(teacher, share, generator, logged or recorded, recorded, believed)
        losses: dict[str, Tensor]
        if not recorded:
            losses, self._weights = engine(batch, self._targets), None
            return losses
        losses, features = engine(batch, self._targets)
        self._weights = StepWeights(features, teacher, step_regulation(run.loss, self._targets)[0], losses)
        return losses

    def after(self, engine: DeepSpeedEngine, step: int, batch: Batch) -> str | None:
        assert self._targets is not None
        believed, teacher = self._targets.momentum, self._targets.teacher
        if self.momentum and believed:
            self.momentum.update(whole_parameters(engine, engine.module.model))
            self.momentum.push(believed.keys.image, believed.keys.text, batch.pair_ids, teacher)
        self._targets = None
        return self._record(step + 1, self._weights, batch) if self._weights else None

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

    def _record(self, done: int, weights: StepWeights, batch: Batch) -> str | None:
        figures, lowest = weights.record(batch, self.run.records.lowest)
        with same_error():
            if self.records:
                self.records.write(done, figures, lowest)
        return self._cautions.of_weights(done, weights.regulation.alpha, figures)
