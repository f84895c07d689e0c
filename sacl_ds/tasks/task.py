"""Interface of a downstream task: examples, a model, an objective, and its evaluation."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.draws import words
from sacl_ds.data.loader import Collates
from sacl_ds.data.pictures import Picture
from sacl_ds.data.text import Tokenizer
from sacl_ds.data.transforms import CanonicalView, TrainView
from sacl_ds.distributed import rank, world_size
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.examples import ExampleSource
from sacl_ds.training.step import Losses, Step, summed_step
from sacl_ds.training.task import Figures

GREATEST = 10  # magnitude
_FILL = [128.0, 128.0, 128.0]
_SHEAR, _DEGREES, _FACTOR, _SHIFT = 0.03, 3.0, 0.05, 1 / 384  # a step of magnitude
_SIDED = re.compile(r"(?<![^\W\d_])(?:left|right)", re.IGNORECASE)  # not in bright, upright, cleft
_OPERATIONS, _MIRROR = 1, 2  # purpose of a draw; a view's crop is drawn from the bare entropy

Operation = Callable[[Tensor, float], Tensor]


def _moved(pixels: Tensor, across: float = 0.0, down: float = 0.0) -> Tensor:
    """Translate an image right and down by these shares of its width and height, rounded to whole pixels."""
    shift = [round(across * pixels.shape[2]), round(down * pixels.shape[1])]
    return functional.affine(pixels, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0], fill=_FILL)


def _sheared(pixels: Tensor, across: float = 0.0, down: float = 0.0) -> Tensor:
    """Shear an image: the point (x, y), from the top left corner, moves to (x + across * y, y + down * x)."""
    shear = [-math.degrees(math.atan(share)) for share in (across, down)]  # torchvision's angles turn the other way
    return functional.affine(
        pixels, 0.0, [0, 0], 1.0, shear, interpolation=InterpolationMode.BILINEAR, fill=_FILL, center=[0.0, 0.0]
    )


def _turned(pixels: Tensor, degrees: float) -> Tensor:
    """Rotate an image about its centre, counter-clockwise."""
    return functional.rotate(pixels, degrees, interpolation=InterpolationMode.BILINEAR, fill=_FILL)


# each takes (3, H, W) uint8 and a signed magnitude, and gives the same shape and type
OPERATIONS: dict[str, Operation] = {
    "identity": lambda pixels, step: pixels,
    "autocontrast": lambda pixels, step: functional.autocontrast(pixels),
    "equalize": lambda pixels, step: functional.equalize(pixels),
    "brightness": lambda pixels, step: functional.adjust_brightness(pixels, 1 + _FACTOR * step),
    "sharpness": lambda pixels, step: functional.adjust_sharpness(pixels, 1 + _FACTOR * step),
    "shear_x": lambda pixels, step: _sheared(pixels, across=_SHEAR * step),
    "shear_y": lambda pixels, step: _sheared(pixels, down=_SHEAR * step),
    "translate_x": lambda pixels, step: _moved(pixels, across=_SHIFT * step),
    "translate_y": lambda pixels, step: _moved(pixels, down=_SHIFT * step),
    "rotate": lambda pixels, step: _turned(pixels, _DEGREES * step),
}


def drawn_operations(count: int, magnitude: int, entropy: tuple[int, ...]) -> list[tuple[str, int]]:
    """(name, signed magnitude) of those of `count` drawn operations that are carried out, in order."""
    names = tuple(OPERATIONS)
    drawn = words(2 * count, *entropy, _OPERATIONS) if count else ()
    return [
        (names[name % len(names)], magnitude if chance & 2 else -magnitude)
        for name, chance in zip(drawn[::2], drawn[1::2], strict=True)
        if chance & 1
    ]


@dataclass(frozen=True)
class FinetuneView:
    """Random resized crop, mirroring where asked for, then `operations` of `OPERATIONS`; drawn from `entropy` alone.

    scale: share of the picture that a crop keeps; None: always the square in the middle.
    magnitude: how strong, 0 to 10; at 0 only autocontrast and equalize still change anything.
    """

    size: int
    scale: tuple[float, float] | None
    flip: bool
    operations: int = 2
    magnitude: int = 7

    def __post_init__(self) -> None:
        if self.operations < 0 or not 0 <= self.magnitude <= GREATEST:
            raise ValueError(
                f"operations={self.operations}, magnitude={self.magnitude}: at least 0, and 0 to {GREATEST}"
            )

    def __call__(self, picture: Picture, entropy: tuple[int, ...]) -> Tensor:
        """Transform a picture to (3, size, size) uint8. Raises BadImage."""
        pixels = self._seen(picture, entropy)
        for name, step in drawn_operations(self.operations, self.magnitude, entropy):
            pixels = OPERATIONS[name](pixels, step)
        return pixels

    def _seen(self, picture: Picture, entropy: tuple[int, ...]) -> Tensor:
        if self.scale is not None:
            return TrainView(self.size, self.scale, self.flip)(picture, entropy)
        pixels = CanonicalView(self.size)(picture, entropy)
        return pixels.flip(2) if self.flip and words(1, *entropy, _MIRROR)[0] & 1 else pixels

    def for_text(self, text: str) -> FinetuneView:
        """Return this transform for a picture with this text: without mirroring where it could make the text false.

        Mirroring is left out where a word begins with left or right, in any case: leftmost, left-hand. That leftovers
        may not be mirrored either does no harm.
        """
        return replace(self, flip=False) if self.flip and _SIDED.search(text) else self


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


def task_of(run: FinetuneConfig) -> Task:
    """Make the task that the configuration names; the others are not imported."""
    if run.task == "retrieval":
        from sacl_ds.tasks.retrieval.task import RetrievalTask

        return RetrievalTask(run)
    if run.task == "vqa":
        from sacl_ds.tasks.vqa.task import VqaTask

        return VqaTask(run)
    from sacl_ds.tasks.nlvr2.task import Nlvr2Task

    return Nlvr2Task(run)
