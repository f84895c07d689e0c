"""What a run should be told about its regulation while it goes on, once each: signs of a sharpness that is too large.

Both signs concern the student's own term of the similarity, (1 - alpha) e^(kappa c), in which the model judges itself.
A frozen teacher's term has no such feedback. At equal cosines near 1 the student's term is the share
sigmoid(log((1 - alpha) / alpha) + kappa - kappa_t) of the whole; under a tenth, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sacl_ds.config import RunConfig

LEAST_SHARE = 0.2
"""Effective share of the negatives under which their weights are those of too large a sharpness.

Scenes, measured at the end of runs: near the best sharpness 0.29; at 12 without teacher, collapsed (the push had turned
round: mass -7.8 nats at logit scale 18), 0.16; at 20 with teacher, past its best, 0.13. For cosines that spread
normally with deviation d it is e^-(kappa d)^2, so 0.2 is kappa d = 1.27: an anchor's weights differ by a factor of
3.6 within one deviation. Mass and shape do not tell the cases apart: shape is 1.5 nats collapsed, 3.1 past the best.
"""

_LEAST_OF_STUDENT = 0.1


class Cautions:
    """The same on all ranks, since the figures are. Each function gives the line to say, or None."""

    def __init__(self, run: RunConfig) -> None:
        loss, optim, steps = run.loss, run.optim, run.train.steps
        self._regulated = loss.contrastive == "sacl" and loss.sharpness > 0
        self._sharpness = loss.sharpness
        self._of_teacher = loss.sharpness if loss.teacher_sharpness is None else loss.teacher_sharpness
        # an untrained model's cosines are random or lie in a narrow cone: its weights say nothing of what they become
        self._settled_after = max(steps // 10, min(optim.warmup_steps, steps // 2))
        self._said: set[str] = set()

    def of_scale(self, done: int, alpha: float, logit_scale: float) -> str | None:
        """After `done` steps: the sharpness passes half of the logit scale.

        The push on a negative goes as e^((logit_scale - kappa) c): at half, it rises half as fast with similarity as
        InfoNCE's, beyond the scale it falls. The scale is learned and rises at first, so that half of it counts after
        the start only.
        """
        limit = logit_scale / 2 if done > self._settled_after else logit_scale
        if self._sharpness <= limit or not self._judges(alpha):
            return None
        return self._once(
            "scale",
            f"loss.sharpness={self._sharpness:g} is over half of the logit scale ({logit_scale:.1f} at step {done}): "
            "the push on a negative goes as exp((logit scale - sharpness) * cosine) and inverts beyond the scale; take "
            f"loss.sharpness={logit_scale / 2:.2g} or less, or leave more to a teacher (loss.alpha_end)",
        )

    def of_weights(self, done: int, alpha: float, figures: Sequence[Mapping[str, Any]]) -> str | None:
        """After `done` steps: the rows recorded then (both directions) look like the collapse at too large a sharpness;
        see LEAST_SHARE."""
        share = sum(row["effective_share"] for row in figures) / len(figures)
        if done <= self._settled_after or not share < LEAST_SHARE or not self._judges(alpha):
            return None
        mass = sum(row["mass"] for row in figures) / len(figures)
        return self._once(
            "weights",
            f"weights as of too large a sharpness: at step {done} the effective number of negatives is {share:.0%} of "
            f"all, mass {mass:.1f} nats (under {LEAST_SHARE:.0%} models were past their best, or collapsed); take a "
            f"lower loss.sharpness (now {self._sharpness:g}), or leave more to a teacher (loss.alpha_end)",
        )

    def _judges(self, alpha: float) -> bool:
        """Whether the student's term counts."""
        if not self._regulated or alpha >= 1:
            return False
        if alpha <= 0:
            return True
        odds = math.log1p(-alpha) - math.log(alpha) + self._sharpness - self._of_teacher
        return odds >= math.log(_LEAST_OF_STUDENT / (1 - _LEAST_OF_STUDENT))

    def _once(self, kind: str, line: str) -> str | None:
        if kind in self._said:
            return None
        self._said.add(kind)
        return line
