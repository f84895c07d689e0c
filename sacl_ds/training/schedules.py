"""Learning rate, alpha, the share of soft targets and which steps are recorded, as functions of the step alone.

So a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sacl_ds.config import OptimConfig, RecordsConfig, RunConfig


def learning_rate_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Return the share of the peak learning rate at `step` (0-based) of `steps`: linear warm-up, then cosine or
    constant."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def alpha_end_step(run: RunConfig) -> int:
    """Return the step from which alpha is constant: as set, or half of all steps."""
    return run.train.steps // 2 if run.loss.alpha_end_step is None else run.loss.alpha_end_step


def alpha(step: int, run: RunConfig) -> float:
    """Return the teacher's share of the similarity: linear from alpha_start to alpha_end, then constant."""
    start, end, over = run.loss.alpha_start, run.loss.alpha_end, alpha_end_step(run)
    return end if step >= over else start + (end - start) * step / over


def soft_weight(step: int, run: RunConfig, pairs: int) -> float:
    """Return the share of soft targets: linear from 0 to momentum.distill_weight over the first epoch of `pairs`."""
    epoch = pairs / run.train.global_batch_size
    return run.momentum.distill_weight * min(1.0, step / epoch)


def is_recorded(done: int, steps: int, records: RecordsConfig) -> bool:
    """Return whether the step that makes `done` is recorded: the first of `steps`, every so many, the last."""
    return bool(records.every) and (done in (1, steps) or done % (records.every or 1) == 0)


def changed_schedules(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """Return a line where the configured schedules differ, at a checkpoint's step, from the values saved in it."""
    changed = [
        f"{name} at {now[name]:.3g} in place of {value:.3g}"
        for name, value in before.items()
        if name in now and not math.isclose(value, now[name], rel_tol=1e-6, abs_tol=1e-12)
    ]
    if not changed:
        return []
    return [f"train.steps or other settings of schedules have changed: it goes on with {', '.join(changed)}"]
