"""Configuration of a downstream task: fine-tuning and evaluation. Defaults depend on task and source of examples."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from sacl_ds.config.data import ScenesConfig
from sacl_ds.config.loss import LossConfig
from sacl_ds.config.room import Fraction, Natural, NaturalFloat, PathText, Positive, PositiveFloat, Room
from sacl_ds.config.training import OptimConfig, TrainConfig, TrainingConfig

TaskName = Literal["retrieval", "vqa", "nlvr2"]
TASKS: tuple[str, ...] = get_args(TaskName)
Split = Literal["train", "val", "test"]


def task_defaults(task: str, source: str) -> dict[str, Any]:
    """Defaults of `FinetuneConfig`. files: the paper's (Jiang et al. 2023, appendix); scenes: minutes on a CPU."""
    return _SCENES[task] if source == "scenes" else _PAPER[task]


def _paper(lr_image: float, lr_text: float, batch: int, epochs: int) -> dict[str, Any]:
    optim = {"lr_image": lr_image, "lr_text": lr_text, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_steps": 0}
    train = {"global_batch_size": batch, "epochs": epochs, "eval_every": None, "save_every": None}
    return {"optim": optim, "train": train, "augment": {"crop_scale": [0.5, 1.0], "flip": True, "operations": 2}}


def _scenes(lr: float, weight_decay: float, steps: int, batch: int) -> dict[str, Any]:
    optim = {"lr_image": lr, "lr_text": lr, "weight_decay": weight_decay, "warmup_steps": steps // 10}
    return {"optim": optim, "train": {"steps": steps, "global_batch_size": batch, "eval_every": steps // 4}}


_PAPER = {
    "retrieval": _paper(1e-5, 2e-6, 256, 5),
    "vqa": _paper(2e-5, 5e-6, 1024, 8),
    "nlvr2": _paper(5e-5, 5e-6, 256, 15),
}
_SCENES = {
    "retrieval": _scenes(3e-4, 0.01, 800, 128) | {"retrieval": {"rerank": 16, "rerank_similarity": 1.0}},
    "vqa": _scenes(1e-3, 0.01, 1400, 64),
    "nlvr2": _scenes(3e-4, 0.05, 800, 64),
}


class TaskDataConfig(Room):
    source: Literal["scenes", "files"] = Field(
        "scenes",
        description="files: the task's official files, named in the section of the task; scenes: the built-in set",
    )
    images: PathText | None = Field(None, description="folder of the images that the files name")
    scenes: ScenesConfig = ScenesConfig(count=100_000, eval_count=500)
    eval_count: Positive | None = Field(
        None, description="at most so many examples of val while training; null: all of them"
    )
    workers: Natural | None = Field(
        None, description="loader processes a rank; null: the cores it has to spare, at most 8"
    )
    max_bad_share: Fraction = Field(
        0.01,
        description="stop where more examples than this cannot be used; until then others stand in in training, and "
        "evaluation leaves them out",
    )


class AugmentConfig(Room):
    """Augmentation of training pictures; evaluation sees the square in the middle."""

    crop_scale: tuple[Fraction, Fraction] | None = Field(
        None, description="share of the picture that random resized crops keep; null: the square in the middle"
    )
    flip: bool = Field(False, description="mirror half of the pictures whose text says neither left nor right")
    operations: Natural = Field(0, description="of RandAugment, a picture; ALBEF and the paper: 2; 0: none")
    magnitude: Natural = Field(7, le=10, description="of those operations, from 0 to 10")

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        scale = self.crop_scale
        if scale is not None and not 0 < scale[0] <= scale[1]:
            raise ValueError(f"augment.crop_scale={list(scale)}: two shares, the smaller one first and above 0")
        return self


class RetrievalConfig(Room):
    annotations: PathText | None = Field(None, description="Karpathy JSON of COCO, Flickr30k or Flickr8k")
    train_split: str = Field("train", description="its name there; train takes restval too")
    val_split: str = Field("val", description="its name there")
    test_split: str = Field("test", description="its name there")
    rerank: Natural = Field(
        128,
        description="candidates of each query that ITM puts in order (ALBEF: COCO 256, Flickr30k 128); 0: none",
    )
    rerank_similarity: NaturalFloat = Field(
        0.0, description="how much of ITC's logit is added to ITM's log-odds there; 0 as in ALBEF, 1 as in BLIP"
    )
    gallery: Natural = Field(8, description="queries shown in gallery.png with their first images; 0: none")


class VqaConfig(Room):
    train_questions: PathText | list[PathText] | None = Field(
        None, description="official question JSON, one or several"
    )
    train_annotations: PathText | list[PathText] | None = Field(None, description="their annotation JSON, as many")
    val_questions: PathText | None = Field(None, description="official question JSON")
    val_annotations: PathText | None = Field(None, description="its annotation JSON")
    test_questions: PathText | None = Field(None, description="official question JSON")
    test_annotations: PathText | None = Field(None, description="its annotation JSON; null: predictions alone")
    visual_genome: PathText | None = Field(
        None, description="question_answers.json of Visual Genome, as more training data"
    )
    visual_genome_images: PathText | None = Field(None, description="folder of its images; null: data.images")
    answers: PathText | None = Field(
        None, description="JSON list of the answers to choose from; null: built from the training questions"
    )
    answers_at_least: Positive = Field(
        9, description="an answer counts where it is the most frequent one of so many training questions"
    )
    ranked: Positive = Field(128, description="answers, by their first token, whose whole likelihood is computed")
    first_token_twice: bool = Field(
        True, description="count the first token's probability twice, as ALBEF's code does; false: the likelihood"
    )


class Nlvr2Config(Room):
    train: PathText | None = Field(None, description="official JSON lines (train.json)")
    val: PathText | None = Field(None, description="official JSON lines (dev.json)")
    test: PathText | None = Field(
        None, description="official JSON lines (test1.json); without labels: predictions alone"
    )


class TaskLossConfig(LossConfig):
    mlm_weight: NaturalFloat = Field(0.0, description="must stay 0: fine-tuning has no MLM")


class TaskTrainConfig(TrainConfig):
    steps: Natural | None = Field(None, description="optimizer steps; null: train.epochs")  # type: ignore[assignment]
    epochs: PositiveFloat = Field(5, description="times that every training example is seen, where train.steps is null")
    eval_every: Positive | None = Field(None, description="steps between evaluations on val; null: after every epoch")
    save_every: Positive | None = Field(None, description="steps between checkpoints; null: after every epoch")


class EvaluationConfig(Room):
    split: Split = Field("test", description="what launch/evaluate.py looks at; val where a task has no test files")
    batch_size: Positive | None = Field(None, description="examples a pass; null: 256 up to 128 pixels, else 32")


class FinetuneConfig(TrainingConfig):
    task: TaskName = Field(description="what the model is for")
    checkpoint: PathText | None = Field(
        None,
        description="the run, or its checkpoints/step_N, to start from, with its model; null: as section model says",
    )
    data: TaskDataConfig = TaskDataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: TaskLossConfig = TaskLossConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    vqa: VqaConfig = VqaConfig()
    nlvr2: Nlvr2Config = Nlvr2Config()
    optim: OptimConfig = OptimConfig()
    train: TaskTrainConfig = TaskTrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> FinetuneConfig:
        if self.data.source == "scenes" and (self.augment.crop_scale or self.augment.flip or self.augment.operations):
            raise ValueError(
                "crops, flips and RandAugment falsify what is said of scenes; leave the room augment alone"
            )
        if self.loss.mlm_weight:
            raise ValueError(f"loss.mlm_weight={self.loss.mlm_weight:g}: fine-tuning has no MLM; leave it out")
        return self

    @property
    def title(self) -> str:
        return f"{self.task}-{self.data.source}"

    @property
    def steps(self) -> int:
        """Number of training steps; known once the epochs are counted."""
        assert self.train.steps is not None
        return self.train.steps

    @property
    def batch_size(self) -> int:
        """Examples per forward pass of an evaluation."""
        return self.evaluation.batch_size or (256 if self.model.image_size <= 128 else 32)
