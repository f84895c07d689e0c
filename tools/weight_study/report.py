"""Report of a study: its progress on the terminal, its plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from weight_study.plan import Plan
from weight_study.runner import Trial
from weight_study.summary import METRIC, ArmSummary, Results, rows, save_csv, table, verdict

_COLOURS = {
    "infonce": "#777777", "control": "#b07020", "regulated": "#1f6fb4", "other": "#8a5fb0", "oracle": "#2a9050",
    "teacher": "#c0c0c0",
}  # fmt: skip


def plot_arms(found: list[ArmSummary], path: Path) -> None:
    """Plot every arm's mAP, best at the top: a diamond for the mean, a dot a seed."""
    figure = Figure(figsize=(9, 1.2 + 0.24 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(found)):
        values, colour = [100 * value for value in row.values[METRIC]], _COLOURS[row.family]
        axes.plot([min(values), max(values)], [place, place], color=colour, lw=1)
        axes.plot(values, [place] * len(values), "o", color=colour, ms=3.5)
        axes.plot(100 * row.mean, place, "D", color=colour, ms=7)
    axes.set_yticks(range(len(found)), [row.name for row in reversed(found)], fontsize=8)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlabel("mAP over all satisfying images, per cent (diamond: mean of the seeds)")
    axes.grid(alpha=0.3)
    present = [family for family in _COLOURS if any(row.family == family for row in found)]
    handles = [Line2D([], [], marker="D", ls="", color=_COLOURS[family]) for family in present]
    axes.legend(handles, present, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def plot_sweeps(plan: Plan, found: list[ArmSummary], path: Path) -> bool:
    """Plot mAP along the plan's sweeps, with the best arms of other families as lines; False where nothing is drawn."""
    known = {row.name: row for row in found}
    sweeps = {
        title: sorted(((value, known[name]) for name, value in points.items() if name in known), key=lambda p: p[0])
        for title, points in plan.sweeps.items()
    }
    sweeps = {title: points for title, points in sweeps.items() if len(points) > 1}
    if not sweeps:
        return False
    figure = Figure(figsize=(4 * len(sweeps), 3.4), layout="constrained")
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    for axes, (title, points) in zip(panels, sweeps.items(), strict=True):
        values = [value for value, _ in points]
        means = [100 * row.mean for _, row in points]
        axes.errorbar(values, means, [100 * row.spread for _, row in points], marker="o", capsize=3, color="#1f6fb4")
        for family, style in (("infonce", ":"), ("control", "--"), ("oracle", "-")):
            best = next((row for row in found if row.family == family), None)
            if best is not None:
                axes.axhline(100 * best.mean, color=_COLOURS[family], ls=style, label=f"best {family}: {best.name}")
        axes.set_xlabel(title)
        if values[0] > 0 and values[-1] / values[0] > 20:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mAP, per cent")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    return True


def write_summary(plan: Plan, results: Results, out: Path) -> str:
    """Write table.md, trials.csv, arms.png and sweeps.png into `out`; returns the table with the verdict."""
    found = rows(plan, results)
    if not found:
        return "no arm has all its seeds yet"
    text = "\n\n".join([table(found), *verdict(found)])
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    save_csv(plan, results, out / "trials.csv")
    plot_arms(found, out / "arms.png")
    plot_sweeps(plan, found, out / "sweeps.png")
    return text


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
