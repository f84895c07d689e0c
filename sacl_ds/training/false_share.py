"""Calibration for loss.false_share: from a share of the pairs to settings of the regulation, by the first batches."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sacl_ds.config import RunConfig
from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.sources import TrainingData
from sacl_ds.distributed import gather_rows, rank, row_counts, world_size
from sacl_ds.errors import UserError
from sacl_ds.model.teacher import Teacher, teacher_features

_PAIRS = 1024  # looked at; of a larger batch as many

FALLING_SHARPNESS = 30.0
"""kappa_t of falling weights where none is chosen: 95 % of the weight is gone 0.1 above the bend."""


def falling_weights(cosines: np.ndarray, share: float, teacher_sharpness: float) -> tuple[float, float]:
    """Return (c0, alpha) of weights that are flat below a teacher's cosine c0 and fall above it.

    With the model's sharpness at 0 the similarity is s = alpha e^(kappa_t c) + (1 - alpha). c0 is the cosine that
    `share` of the cosines exceeds, and alpha the constant share of the teacher with alpha e^(kappa_t c0) = 1 - alpha:
    there the weight is half of what it is far below. cosines: any shape. Raises ValueError for a share outside (0, 1)
    or a sharpness that is not positive.
    """
    if not 0 < share < 1 or teacher_sharpness <= 0:
        raise ValueError(f"share={share} must lie in (0, 1) and teacher_sharpness={teacher_sharpness} above 0")
    c0 = float(np.quantile(np.asarray(cosines, np.float64), 1 - share))
    x = teacher_sharpness * c0
    return c0, math.exp(-x) / (1 + math.exp(-x)) if x >= 0 else 1 / (1 + math.exp(x))


def with_falling_weights(
    run: RunConfig, data: TrainingData, teacher: Teacher, device: torch.device
) -> tuple[RunConfig, str]:
    """Calibrate the regulation so that weights fall for loss.false_share of the negatives, by the teacher's cosine.

    Returns the run with sharpness, teacher_sharpness and a constant alpha, and a line that says so. batches: this
    rank's, from the first step on; every rank calls it. They alone decide, so a resumed run finds the same. Raises
    UserError where alpha cannot be told from 0 or 1.
    """
    share = run.loss.false_share
    assert share is not None
    sharpness = FALLING_SHARPNESS if run.loss.teacher_sharpness is None else run.loss.teacher_sharpness
    batches = iter(BatchLoader(data.source, data.order, data.collator, rank=rank(), world=world_size(), workers=0))
    cosines: list[Tensor] = []
    seen = 0
    while seen < _PAIRS:
        batch = next(batches).to(device)
        image, text = teacher_features(teacher, batch)
        counts = row_counts(image)
        rows = [gather_rows(part, counts)[:_PAIRS] for part in (image, text, batch.pair_ids)]
        negatives = ~(rows[2][:, None] == rows[2]).any(-1)
        cosines.append((rows[0] @ rows[1].T)[negatives])
        seen += sum(counts)
    start, alpha = falling_weights(torch.cat(cosines).cpu().numpy(), share, sharpness)
    if not 0 < alpha < 1:
        raise UserError(
            f"loss.teacher_sharpness={sharpness:g} is too much for a teacher with {share:.1%} of its cosines above "
            f"{start:.2f}; choose a smaller one"
        )
    settings = {"sharpness": 0.0, "teacher_sharpness": sharpness, "alpha_start": alpha, "alpha_end": alpha}
    said = (
        f"loss.false_share={share:g}: weights fall above a teacher's cosine of {start:.3f} "
        f"(alpha {alpha:.3g}, kappa_t {sharpness:g})"
    )
    return run.model_copy(update={"loss": run.loss.model_copy(update=settings)}), said
