"""Interface of a downstream task: examples, a model, an objective, and its evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.augment import FinetuneView
from sacl_ds.data.downstream.examples import ExampleSource
from sacl_ds.data.loader import Collates
from sacl_ds.data.text import Tokenizer
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.distributed import rank, world_size
from sacl_ds.model.sacl import SaclModel
from sacl_ds.training.step import Losses, Step, summed_step
from sacl_ds.training.task import Figures

Done = Callable[[str, int, int], None]  # (stage, done of it, all of it) on this rank


class Outcome(Protocol):
    """Outcome of an evaluation; the same on every rank."""

    figures: Figures
    notes: list[str]

    def write(self, folder: Path) -> list[Path]:
        """Write predictions and pictures, in the task's own formats."""


@dataclass(frozen=True)
class EvaluationContext:
    """Inputs of an evaluation beside the model. limit: at most so many examples."""

    tokenizer: Tokenizer
    device: torch.device
    limit: int | None = None
    done: Done = lambda stage, count, total: None

    def counted(self, stage: str, count: int) -> Callable[[int], None]:
        """Return a callback that counts the examples done on this rank, of an evaluation of `count` over all ranks."""
        total, so_far = len(range(rank(), count, world_size())), 0

        def more(examples: int) -> None:
            nonlocal so_far
            so_far += examples
            self.done(stage, so_far, total)

        return more


class Task(ABC):
    """Downstream task. Annotation files are read when a split is first asked for. Raises UserError, with file and
    place."""

    rows: str  # what a row of a batch is called
    kept: tuple[str, ...] = ()  # files in the run's directory that `keep` writes
    origin: str  # where the parts of the task's model come from that a pre-trained one does not have

    def __init__(self, run: FinetuneConfig) -> None:
        self.run = run

    @property
    @abstractmethod
    def main(self) -> str:
        """Name of the metric that decides which weights are kept; larger is better."""

    @abstractmethod
    def count(self, split: str) -> int:
        """Count the examples of a split; 0 where the configuration names none."""

    def labelled(self, split: str) -> bool:
        """Return whether anything in that split has labels."""
        return True

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """Yield the training examples' texts, on which a vocabulary is trained where none is given."""

    def tokenizer(self, begin: Tokenizer) -> Tokenizer:
        """Return the run's tokenizer, made from that of the model it starts from."""
        return begin

    @abstractmethod
    def training(self, tokenizer: Tokenizer) -> tuple[ExampleSource, Collates[Any]]: ...

    def training_view(self) -> FinetuneView:
        """Return the transform of training pictures; `for_text` leaves out mirroring where a text forbids it."""
        augment = self.run.augment
        return FinetuneView(
            self.run.model.image_size, augment.crop_scale, augment.flip, augment.operations, augment.magnitude
        )

    def held_out_view(self) -> CanonicalView:
        """Return the transform of pictures that are not trained on."""
        return CanonicalView(self.run.model.image_size)

    @abstractmethod
    def model(self, start: SaclModel, tokenizer: Tokenizer) -> nn.Module:
        """Build the task's model from a pre-trained one; what is new in it comes from torch's random state."""

    @abstractmethod
    def objective(self, model: Any) -> nn.Module:
        """Return a module from a batch to a dict of losses; `model` lies in its attribute of that name."""

    def forward_backward(self, engine: Any, batch: Any, step: Step) -> Losses:
        """Run forward and backward of a step."""
        return summed_step(engine, batch, step)

    @abstractmethod
    def evaluate(self, model: Any, split: str, seen: EvaluationContext) -> Outcome:
        """Evaluate the model on a split; every rank calls it, and gets the same."""

    def keep(self, folder: Path) -> None:  # noqa: B027 - most tasks need nothing
        """Save in the run directory what an evaluation needs of the training examples."""

    def take(self, folder: Path) -> None:  # noqa: B027
        """Load what `keep` saved."""
