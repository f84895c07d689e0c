"""Interface between the training loop and one kind of training: pre-training and each downstream task fill in these
hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from sacl_ds.config import TrainingConfig
from sacl_ds.data.loader import Collates
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.sample import Source
from sacl_ds.ds_config import EngineConfig
from sacl_ds.telemetry.throughput import RowFlops
from sacl_ds.training.checkpoint_folder import Identity
from sacl_ds.training.step import Losses, Step

if TYPE_CHECKING:  # not every run has one
    from sacl_ds.config import RunConfig
    from sacl_ds.data.batch import View
    from sacl_ds.model.momentum import Momentum
    from sacl_ds.model.sacl import SaclModel

Figures = dict[str, tuple[float, float]]  # {name: (value, chance)} of an evaluation


class Evaluator(Protocol):
    def __call__(self, model: SaclModel, view: View, device: torch.device) -> Figures:
        """Evaluate the model: {name: (value, chance)}; every rank calls it."""


Evaluators: TypeAlias = "Callable[[RunConfig], Evaluator | None]"  # what a phase is judged by


class TrainingTask:
    """The hooks of a run; every rank calls them. rows: what a row of a batch is called.

    momentum: what checkpoints keep beside the engine's state.
    """

    rows: str
    momentum: Momentum | None = None

    def begin(self, engine: DeepSpeedEngine, resumed_at: int | None) -> None:
        """Prepare, once, before the first step. resumed_at: steps done; None: the run starts anew. Raises UserError."""

    def step(self, engine: DeepSpeedEngine, batch: Any, step: Step) -> tuple[Losses, Tensor | None, str | None]:
        """Run losses, backward, update. Returns the losses, the rows that are not finite, and a line for the user.

        The rows: (b,) bool, those whose own share is not finite, where the update was left out because loss or gradient
        were not; else None. The line may be None.
        """
        raise NotImplementedError

    def names(self, batch: Any) -> list[str]:
        """Return the names by which a user finds the samples of the rows."""
        return list(batch.keys)

    def schedules(self, step: int) -> dict[str, float]:
        """Return the values of the schedules at `step`, for the log."""
        return {}

    def caution(self, done: int, figures: dict[str, Any]) -> str | None:
        """Return a line for the user where the logged metrics ask for one."""
        return None

    def evaluate(self, done: int) -> Figures:
        """Return held-out metrics after `done` steps, the same on every rank; {} where nothing is evaluated."""
        return {}

    def finish(self, engine: DeepSpeedEngine) -> None:
        """Write the finished weights into the run's directory, once, after the last step."""


@dataclass(frozen=True)
class Training:
    """Parts of one training, built for its configuration; `sacl_ds.training.run.train` runs it.

    objective: the module whose forward returns the losses, with the model in its attribute `model`. identity: what its
    checkpoints belong to. workers: loader processes asked for. max_bad_share: how many samples may be unusable.
    id_columns: ids of a pair. row_flops: computes the FLOPs of a row for the log.
    """

    run: TrainingConfig
    folder: Path
    task: TrainingTask
    engine_config: EngineConfig
    objective: nn.Module
    source: Source
    order: GlobalOrder
    collator: Collates[Any]
    identity: Identity
    workers: int | None
    max_bad_share: float
    id_columns: int = 1
    row_flops: Callable[[], RowFlops | None] | None = None
