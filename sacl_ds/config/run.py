"""Configuration of pre-training. Defaults are the built-in run: minutes on two CPU cores."""

from __future__ import annotations

from pydantic import Field, model_validator

from sacl_ds.config.data import DataConfig
from sacl_ds.config.loss import LossConfig, MomentumConfig, TeacherConfig
from sacl_ds.config.room import Natural, Room
from sacl_ds.config.training import TrainingConfig
from sacl_ds.errors import UserError


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
