"""How much a negative weighs: the settings of the regulation and the similarity they make (paper Eq. 4-6 and 9)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Regulation:
    """Settings of the weights w_ij = mass * |Neg(i)| * (1 / s_ij) / sum_k 1 / s_ik.

    alpha: the teacher's share of the similarity s, in [0, 1]; 0 needs no teacher.
    sharpness, teacher_sharpness: kappa of the trained model's cosine and of the teacher's; not negative.
    negative_mass: mean weight of the negatives; positive.
    drop_below: negatives whose mean-1 weight is less are removed, the others weigh 1 (paper section 4.3); or None.

    Raises ValueError for values out of range.
    """

    alpha: float = 0.0
    sharpness: float = 1.0
    teacher_sharpness: float = 1.0
    negative_mass: float = 1.0
    drop_below: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]")
        if self.sharpness < 0 or self.teacher_sharpness < 0:
            raise ValueError(
                f"sharpness={self.sharpness}, teacher_sharpness={self.teacher_sharpness}: must not be negative"
            )
        if self.negative_mass <= 0:
            raise ValueError(f"negative_mass={self.negative_mass} must be positive")
        if self.drop_below is not None and self.drop_below <= 0:
            raise ValueError(f"drop_below={self.drop_below} must be positive; None removes nothing")

    @property
    def even(self) -> bool:
        """All negatives weigh the same, as in InfoNCE."""
        return (self.alpha == 1.0 or self.sharpness == 0) and (self.alpha == 0.0 or self.teacher_sharpness == 0)

    @property
    def plain(self) -> bool:
        """All negatives weigh 1: InfoNCE."""
        return self.even and self.negative_mass == 1.0 and self.drop_below is None

    @property
    def teacher(self) -> bool:
        """Whether the teacher's features make a difference."""
        return self.alpha > 0 and not self.even

    @property
    def steepness(self) -> float:
        """Bound of |log s_ij| for cosines in [-1, 1]."""
        return max(self.sharpness if self.alpha < 1 else 0.0, self.teacher_sharpness if self.alpha > 0 else 0.0)

    def log_similarity(self, cosine: Tensor, teacher_cosine: Tensor | None) -> Tensor:
        """log s_ij of Eq. 5 with sharpness, same shape: exp(kappa) itself leaves float32 at kappa = 89."""
        if self.even:
            return torch.zeros_like(cosine)
        if self.alpha == 0.0 or teacher_cosine is None:
            return self.sharpness * cosine
        if self.alpha == 1.0:
            return self.teacher_sharpness * teacher_cosine
        return torch.logaddexp(
            math.log(self.alpha) + self.teacher_sharpness * teacher_cosine,
            math.log1p(-self.alpha) + self.sharpness * cosine,
        )


FALLING_SHARPNESS = 30.0
"""kappa_t of falling weights where none is chosen: 95 % of the weight is gone 0.1 above the bend."""


def falling_weights(cosines: np.ndarray, share: float, teacher_sharpness: float) -> tuple[float, float]:
    """(c0, alpha) of weights that are flat below a teacher's cosine c0 and fall above it.

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
