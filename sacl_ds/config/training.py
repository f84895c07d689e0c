"""Settings of any training (optimizer, steps, batch, precision), and the root of a pre-training run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from sacl_ds.config.data import DataConfig
from sacl_ds.config.loss import LossConfig, MomentumConfig, TeacherConfig
from sacl_ds.config.model import ModelConfig
from sacl_ds.config.room import Fraction, Natural, NaturalFloat, PathText, Positive, PositiveFloat, Room
from sacl_ds.errors import UserError


class OptimConfig(Room):
    lr_image: PositiveFloat = Field(1e-3, description="peak learning rate of the image encoder")
    lr_text: PositiveFloat = Field(1e-3, description="peak learning rate of everything else")
    weight_decay: NaturalFloat = Field(0.01, description="decoupled; on matrices only")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.98), description="AdamW")
    eps: PositiveFloat = Field(1e-8, description="AdamW")
    warmup_steps: Natural = Field(100, description="linear, from 0")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    final_lr: Fraction = Field(0.01, description="share of the peak learning rate where cosine ends")
    clip_norm: NaturalFloat = Field(1.0, description="global gradient norm; 0: no clipping")


class TrainConfig(Room):
    steps: Natural = Field(500, description="optimizer steps")
    global_batch_size: Positive = Field(128, description="pairs contrasted with each other in a step, over all ranks")
    micro_batch_size: Positive | None = Field(
        None,
        description="pairs that a rank passes through the model at once, for less memory and a second forward pass; "
        "ITC and MLM keep their gradients, ITM draws its negatives from these pairs; null: global_batch_size / ranks",
    )
    coalesce_reduction: bool = Field(
        False,
        description="with micro-batches under ZeRO 2 and 3: reduce gradients once a step, for the memory of a whole "
        "gradient on each rank",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="bf16, fp16: autocast; parameters, logit scale and losses stay fp32. fp16: for GPUs without bf16, "
        "without ZeRO",
    )
    checkpoint_activations: bool = Field(
        False,
        description="recompute each block in backward: less memory, about a third more time",
    )
    max_bad_steps: Natural = Field(
        10,
        description="steps with NaN or inf, among the last 1000, that are left out; one more ends the run",
    )
    max_restarts: Natural = Field(
        0, description="how often each rank is started anew after a fault, from the newest checkpoint"
    )
    peer_timeout: PositiveFloat = Field(
        60.0, description="seconds without a word of another rank after which all ranks end"
    )
    step_timeout: PositiveFloat = Field(
        1800.0,
        description="seconds of a step after the first, or of waiting for its data, after which all ranks end",
    )
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    eval_every: Positive | None = Field(100, description="steps between held-out retrievals; null: only at the end")
    save_every: Positive | None = Field(None, description="steps between checkpoints; null: only at the end")
    keep_checkpoints: Positive | None = Field(
        None, description="keep so many of the newest checkpoints, and those named next; null: keep all"
    )
    keep_every: Positive | None = Field(
        None, description="with keep_checkpoints: those of every so many steps stay, too"
    )
    keep_best: str | None = Field(
        None,
        description="with keep_checkpoints: the best by this held-out figure stays, too, e.g. text_to_image_any_R@1",
    )


class KernelsConfig(Room):
    apex: Literal["auto", "on", "off"] = Field(
        "auto", description="NVIDIA apex's fused kernels; auto: where it is installed and there is a GPU"
    )

    compile: bool = Field(
        False,
        description="torch.compile of each block of the encoders: minutes at the start; ZeRO 0 to 2 only",
    )

    @field_validator("apex", mode="before")
    @classmethod
    def _on_and_off(cls, value: Any) -> Any:
        """Convert YAML's on and off, which it reads as booleans, back to text."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class TrainingConfig(Room):
    """Settings shared by pre-training and the downstream tasks."""

    output_dir: PathText | None = Field(
        None,
        description="run directory; null: runs/scenes-001, -002, ..., or the last of them with --resume",
    )
    seed: Natural = Field(0, description="of initial weights, data order, masking and dropout")
    model: ModelConfig = ModelConfig.model_validate({})
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    kernels: KernelsConfig = KernelsConfig()

    @property
    def title(self) -> str:
        """Name of numbered run directories, before the number."""
        raise NotImplementedError

    def micro_batches(self, world: int) -> tuple[int, int]:
        """Return the rows per forward pass, and how many passes make up a rank's part of the global batch.

        Raises UserError where they do not divide it.
        """
        total, micro = self.train.global_batch_size, self.train.micro_batch_size
        if total % world:
            raise UserError(
                f"train.global_batch_size={total} does not divide over {world} ranks; "
                f"take {math.ceil(total / world) * world}, or another number of ranks"
            )
        rows = total // world
        if micro is None:
            return rows, 1
        if rows % micro:
            fitting = max(size for size in range(1, min(micro, rows) + 1) if rows % size == 0)
            raise UserError(
                f"train.micro_batch_size={micro} does not divide the {rows} pairs that train.global_batch_size={total} "
                f"gives each of {world} ranks; take {fitting}, or leave it out"
            )
        return micro, rows // micro

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


class RecordsConfig(Room):
    """Records of the negatives' weights, in weights/ of the run directory (docs/tools.md)."""

    every: Natural | None = Field(100, description="steps between records, besides the first and last; 0 or null: none")
    lowest: Natural = Field(64, description="pairs of least weight kept in each record, for both directions")


class RunConfig(TrainingConfig):
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    momentum: MomentumConfig = MomentumConfig()
    teacher: TeacherConfig = TeacherConfig()
    records: RecordsConfig = RecordsConfig()

    @model_validator(mode="after")
    def _features_are_somebodys(self) -> RunConfig:
        if self.teacher.features and (not self.teacher.checkpoint or self.data.source != "shards"):
            raise ValueError(
                "teacher.features are of a teacher and of shards; give teacher.checkpoint and data.source=shards"
            )
        return self

    @model_validator(mode="after")
    def _false_share_needs_a_teacher(self) -> RunConfig:
        share = self.loss.false_share
        if share is not None and not 0 < share < 1:
            raise ValueError(f"loss.false_share={share}: a share between 0 and 1, or null")
        if share is not None and not self.uses_teacher:
            raise ValueError(
                f"loss.false_share={share} needs a teacher and loss.contrastive=sacl; give teacher.checkpoint or "
                "teacher.steps, or leave it out"
            )
        return self

    def micro_batches(self, world: int) -> tuple[int, int]:
        """Split as every training does; also raise UserError for micro-batches too small for ITM's negatives."""
        rows, passes = super().micro_batches(world)
        if rows == 1 and passes > 1 and self.loss.matching_weight:
            raise UserError(
                "train.micro_batch_size=1 leaves ITM without negatives, which it draws from the pairs at hand; take 2 "
                "or more, or loss.matching_weight=0"
            )
        return rows, passes

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses that are computed: itc, itm, mlm."""
        loss = self.loss
        return "itc", *(("itm",) if loss.matching_weight else ()), *(("mlm",) if loss.mlm_weight else ())

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss asks for a frozen teacher at any step."""
        available = self.teacher.checkpoint is not None or self.teacher.steps > 0
        return self.loss.contrastive == "sacl" and available and max(self.loss.alpha_start, self.loss.alpha_end) > 0

    @property
    def title(self) -> str:
        return self.data.source
