"""The losses, and what regulates the contrastive one: the teacher, the momentum model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sacl_ds.config.data import Detail
from sacl_ds.config.room import Fraction, Natural, NaturalFloat, PathText, PositiveFloat, Room


class LossConfig(Room):
    contrastive: Literal["sacl", "infonce"] = Field("sacl", description="infonce: every negative weighs 1")
    sharpness: NaturalFloat = Field(
        3.0, description="kappa: how fast weight falls with similarity; 1 is the bare paper"
    )
    teacher_sharpness: NaturalFloat | None = Field(
        None, description="kappa_t, for the teacher; null: like sharpness, or 30 with false_share"
    )
    false_share: Fraction | None = Field(
        None,
        description="share of the negatives that are false: weights fall steeply for those most similar to the teacher "
        "and are even for the others (sets sharpness and alpha); null: e^(kappa c)",
    )
    alpha_start: Fraction = Field(1.0, description="the teacher's share of the similarity at step 0")
    alpha_end: Fraction = Field(
        1.0, description="the teacher's share from alpha_end_step on; less hands over to the model itself"
    )
    alpha_end_step: Natural | None = Field(
        None, description="where the linear hand-over ends; null: half of train.steps"
    )
    negative_mass: PositiveFloat = Field(1.0, description="mean weight of the negatives; 1 is the paper's condition 2")
    drop_below: PositiveFloat | None = Field(None, description="remove negatives lighter than this (paper section 4.3)")
    contrastive_weight: NaturalFloat = Field(1.0, description="factor of ITC in the sum of losses")
    matching_weight: NaturalFloat = Field(1.0, description="factor of ITM; 0 skips its passes")
    mlm_weight: NaturalFloat = Field(1.0, description="factor of MLM; 0 skips its passes")
    matching_hardness: NaturalFloat = Field(
        0.25, description="ITM's negatives are drawn in proportion to e^(this * z); 1: as ALBEF, 0: at random"
    )
    matching_regulated: bool = Field(
        False, description="draw those in proportion to w e^(hardness * z): false negatives are no hard ones"
    )
    mlm_probability: Fraction = Field(0.15, description="share of the tokens that MLM predicts")
    backend: Literal["auto", "reference", "streaming", "triton"] = Field(
        "auto", description="computation of the contrastive loss; auto: triton on CUDA, else streaming"
    )


class MomentumConfig(Room):
    """ALBEF's momentum parts (docs/method.md); off, the model is compared with itself alone."""

    enabled: bool = Field(False, description="compare with keys from an average of the model, and a queue of them")
    decay: float = Field(0.995, ge=0, lt=1, description="of that average, a step; 0: the model itself")
    queue_size: Natural = Field(65536, description="earlier pairs whose keys are negatives too; 0: none")
    distill_weight: Fraction = Field(
        0.4, description="share of soft targets in ITC and MLM; from 0, linearly over the first epoch; 0: none"
    )
    regulate_queue: bool = Field(
        True, description="weigh the queue's negatives like the batch's; false: each weighs loss.negative_mass"
    )


class TeacherConfig(Room):
    """The frozen teacher whose similarity regulates the negatives at first."""

    checkpoint: PathText | None = Field(
        None, description="run directory of a trained teacher (launch/configs/teacher.yaml)"
    )
    steps: Natural = Field(300, description="without checkpoint: train one first, for so many steps; 0: no teacher")
    detail: Detail = Field("partial", description="captions of the scenes it learns from, as data.scenes.detail")
    shards: str | None = Field(None, description="clean captioned shards it learns from; null: data.shards")
    features: PathText | None = Field(
        None,
        description="folder of features by tools/precompute_teacher.py, or 'beside' the shards; null: run the teacher",
    )
