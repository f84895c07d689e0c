"""Learning rate, alpha, the share of soft targets and which steps are recorded, as functions of the step alone.

So a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sacl_ds.config import OptimConfig, RecordsConfig, RunConfig


def learning_rate_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate at `step` (0-based) of `steps`: linear warm-up, then cosine or constant."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def alpha_end_step(run: RunConfig) -> int:
    """The step from which alpha is constant: as set, or half of all steps."""
    return run.train.steps // 2 if run.loss.alpha_end_step is None else run.loss.alpha_end_step


def alpha(step: int, run: RunConfig) -> float:
    """The teacher's share of the similarity at `step`: linear from alpha_start to alpha_end, then constant."""
    start, end, over = run.loss.alpha_start, run.loss.alpha_end, alpha_end_step(run)
    return end if step >= over else start + (end - start) * step / over


def soft_weight(step: int, run: RunConfig, pairs: int) -> float:
    """The share of soft targets at `step`: linear from 0 to momentum.distill_weight over the first epoch of `pairs`."""
    epoch = pairs / run.train.global_batch_size
    return run.momentum.distill_weight * min(1.0, step / epoch)


def is_recorded(done: int, steps: int, records: RecordsConfig) -> bool:
    """Whether the step after which `done` are done is recorded: the first of `steps`, every so many, the last."""
    return bool(records.every) and (done in (1, steps) or done % (records.every or 1) == 0)


def changed_schedules(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """A line where schedules stand elsewhere, at the step of a checkpoint, than they stood when it was saved."""
    changed = [
        f"{name} at {now[name]:.3g} in place of {value:.3g}"
        for name, value in before.items()
        if name in now and not math.isclose(value, now[name], rel_tol=1e-6, abs_tol=1e-12)
    ]
    if not changed:
        return []
    return [f"train.steps or other settings of schedules have changed: it goes on with {', '.join(changed)}"]
