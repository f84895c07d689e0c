"""Retention of a run's checkpoints: the newest n, every m-th step's, the best one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sacl_ds.config import TrainConfig


class Judged(Protocol):
    """Interface of a checkpoint: its step, and held-out metrics of that step by name, where it was evaluated."""

    @property
    def step(self) -> int: ...

    @property
    def figures(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Retention:
    """Rule for the checkpoints to keep.

    newest: so many (None: all). every: those at multiples of so many steps, too. best: the one where the metric of this
    name is highest (the first of equals), too.
    """

    newest: int | None = None
    every: int | None = None
    best: str | None = None

    @classmethod
    def of(cls, train: TrainConfig) -> Retention:
        return cls(train.keep_checkpoints, train.keep_every, train.keep_best)

    def superseded(self, saved: list[Judged]) -> set[int]:
        """Return the steps of the checkpoints that may go, among all there are; never the newest."""
        if self.newest is None:
            return set()
        steps = sorted(each.step for each in saved)
        stay = set(steps[-self.newest :])
        if self.every:
            stay |= {step for step in steps if step % self.every == 0}
        if self.best:
            judged = [each for each in saved if not math.isnan(each.figures.get(self.best, math.nan))]
            best = max(judged, key=lambda each: (each.figures[self.best], -each.step), default=None)  # type: ignore[index]
            stay |= {best.step} if best else set()
        return set(steps) - stay
