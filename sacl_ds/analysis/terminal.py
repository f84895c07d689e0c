"""Progress bars and tables of the analysis tools."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sacl_ds.telemetry.progress import duration

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar with the time left on a terminal, or a line now and then elsewhere, both on stderr."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        columns = (
            TextColumn(title, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}  ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
        return
    started = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES and 0 < done < total:
            last = now
            console.print(f"{title} {done}/{total} {unit}  ETA {duration((now - started) * (total - done) / done)}")

    yield advance


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows of text to stdout; the first `left` columns are flush left."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False, emoji=False).print(shown)


def say(line: str) -> None:
    print(line, flush=True)


def labels(paths: Sequence[str | Path]) -> list[str]:
    """The shortest ends of paths, in whole components, that tell them apart."""
    parts = [Path(path).parts for path in paths]
    deepest = max((len(part) for part in parts), default=1)
    for depth in range(1, deepest + 1):
        ends = ["/".join(part[-depth:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]


def per_cent(share: float) -> str:
    """Format a share in per cent with two significant figures: '20', '3.1', '0.042'."""
    value = 100 * share
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value else "0"
