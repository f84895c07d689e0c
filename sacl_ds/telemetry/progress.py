"""Progress of a run for people: a live bar on a terminal, a line now and then elsewhere; tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_RATE = "_per_second"  # after what rows are called
_SECONDS_BETWEEN_LINES = 15.0


class RunProgress:
    """Progress over the steps of one phase; silent on every rank but the first."""

    def __init__(self, title: str, steps: int, start: int, enabled: bool) -> None:
        # names of files and samples are no markup
        self.console = Console(quiet=not enabled, soft_wrap=True, markup=False, emoji=False)
        self.title, self.steps = title, steps
        self._last_line = 0.0
        self._live: Live | None = None
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(title, total=steps, completed=start)
            self._figures = Text()  # a line of its own: beside the bar, 80 columns would cut both
            self._live = Live(Group(self._bar, self._figures), console=self.console, refresh_per_second=4)
            self._live.start()

    def update(self, step: int, figures: Mapping[str, Any], eta_seconds: float) -> None:
        text = describe(figures)
        if self._live is not None:
            self._bar.update(self._task, completed=step)
            self._figures.plain = text
        elif step == self.steps or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            line = f"{self.title} {step}/{self.steps}  ETA {duration(eta_seconds)}  {text}"
            self.console.print(line, highlight=False)

    def advance(self, step: int) -> None:
        if self._live is not None:
            self._bar.update(self._task, completed=step)

    def print(self, *things: Any) -> None:
        self.console.print(*things, highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """Make a bar that appears with the first call of done(count, total)."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as bar:
        tasks: list[TaskID] = []

        def done(count: int, total: int) -> None:
            if not tasks:
                tasks.append(bar.add_task(title, total=total))
            bar.update(tasks[0], completed=count)

        yield done


@contextmanager
def counting_stages(enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Make a bar for each stage, which appears with its first call of done(stage, count, total)."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not enabled) as bar:
        tasks: dict[str, TaskID] = {}

        def done(stage: str, count: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=count)

        yield done


def describe(figures: Mapping[str, Any]) -> str:
    """'itc 3.912 itm 0.601 mlm 0.902  410 pairs/s  0.312 s/step  MFU 41%  38.2 GB  α 0.90  scale 14.2': fits into 100
    columns, and into 80 what is known on a CPU."""
    shown = [name for name in ("itc", "itm", "mlm") if name in figures] or ["loss"]
    parts = [" ".join(f"{name} {figures[name]:.3f}" for name in shown)]
    rates = [name for name in figures if name.endswith(_RATE) and name != "flops_per_second"]
    parts += [f"{figures[name]:.0f} {name.removesuffix(_RATE)}/s" for name in rates]
    parts.append(f"{figures['step_seconds']:.3f} s/step")
    if "mfu" in figures:  # on a GPU, where memory is what runs out
        parts += [f"MFU {figures['mfu']:.0%}", f"{figures['memory_peak_bytes'] / 1e9:.1f} GB"]
    if "alpha" in figures:
        parts.append(f"α {figures['alpha']:.2f}")
    if "logit_scale" in figures:
        parts.append(f"scale {figures['logit_scale']:.1f}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    hours, rest = divmod(max(0, round(seconds)), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


_NAMES = {
    "text_to_image_any_R@1": "text→image R@1, any image that satisfies the caption",
    "text_to_image_mAP": "text→image mAP over all satisfying images",
    "image_to_text_any_R@1": "image→text R@1, any caption that the image satisfies",
    "mean_recall": "mean of the recalls of own pairs",
    "binding_accuracy": "colour bound to shape (own picture against colours exchanged)",
}


def retrieval_table(title: str, figures: Mapping[str, tuple[float, float]]) -> Table:
    """Make a table of values beside chance, in per cent."""
    table = Table(title=title, title_justify="left")
    table.add_column("held-out retrieval")
    table.add_column("%", justify="right")
    table.add_column("chance %", justify="right")
    for name, (value, chance) in figures.items():
        label = _NAMES.get(name, name.replace("_to_", "→").replace("_", " "))
        table.add_row(label, f"{100 * value:.1f}", f"{100 * chance:.1f}")
    return table
