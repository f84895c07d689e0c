"""Progress bar over the trials of a study, and a line for each that ends."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sacl_ds.study.plan import Plan
from sacl_ds.study.runner import Trial
from sacl_ds.study.summary import METRIC


class StudyProgress:
    def __init__(self, plan: Plan, there: Mapping[Trial, Any]) -> None:
        self._bar = Progress(
            TextColumn("trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            speed_estimate_period=3600,
        )
        total = len({plan.fingerprint(name, seed) for name in plan.arms for seed in plan.seeds})
        known = len({plan.fingerprint(*trial) for trial in there})
        self._task = self._bar.add_task("trials", total=total, completed=known)

    def __enter__(self) -> StudyProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def done(self, trial: Trial, result: dict[str, Any]) -> None:
        name, seed = trial
        self._bar.console.print(
            f"{name}, seed {seed}: mAP {100 * result[METRIC]:.1f} ({result['seconds']:.0f} s)", highlight=False
        )
        self._bar.advance(self._task)
