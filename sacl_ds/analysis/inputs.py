"""Resolve a command line's RUN, CHECKPOINT or FEATURES to pairs with features and the regulation that weighs them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sacl_ds.analysis.pairs import Pairs, is_features
from sacl_ds.analysis.subject import (
    WITHOUT,
    Subject,
    data_source,
    load_subject,
    read_pairs,
    regulation_of,
    source_count,
)
from sacl_ds.config import RunConfig
from sacl_ds.config_file import load_config
from sacl_ds.errors import UserError
from sacl_ds.files import seal
from sacl_ds.losses import Regulation
from sacl_ds.model.saved import CONFIG
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


def device_named(name: str | None) -> torch.device:
    """Return the named device; by default a GPU if there is one, else the CPU. Raises UserError for one that cannot be
    used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_THREADS = 16


def in_order(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """work(item) of each item, in the order of the items, whichever is done first; `work` may use PyTorch."""
    threads, before = min(_THREADS, _cores()), torch.get_num_threads()
    waiting: deque[Future[_Result]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Examined:
    """Pairs under a model, and the run that the model comes from."""

    path: str
    pairs: Pairs
    run: RunConfig
    step: int | None  # None where features do not say


def examine(path: str, options: argparse.Namespace) -> Examined:
    """Load features, or compute them; options: as `commands.data_options` declares them. Raises UserError."""
    if is_features(path):
        return _of_features(path, options)
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such directory; give a finished run, RUN/checkpoints/step_N, or saved features")
    device = device_named(options.device)
    subject = load_subject(path, options.teacher, device)
    source = data_source(subject.run, options.shards)
    total = source_count(source)
    count = min(total, options.count)
    if count < total:
        say(f"note: the first {count} of {total} pairs are read; --count reads more")
    with progress("features", count, "pairs") as done:
        pairs = read_pairs(subject, source, count, batch_size=batch_of(subject), progress=done)
    return kept(Examined(path, pairs, subject.run, subject.step), options)


def kept(examined: Examined, options: argparse.Namespace) -> Examined:
    """Save the features where asked for, and say how many samples were left out."""
    pairs = examined.pairs
    if pairs.skipped:
        say(f"note: {pairs.skipped} samples cannot be used; tools/inspect_shards.py names them")
    if options.save_features:
        folder = Path(options.save_features)
        pairs.save(folder)
        examined.run.save(folder / CONFIG)
        seal(folder, (CONFIG,))
        say(f"features of {len(pairs)} pairs in {folder}, to be given in the place of the run")
    return examined


def regulation_for(examined: Examined, options: argparse.Namespace) -> Regulation:
    """Return the run's regulation at its last step, overridden by the command line's options. Raises UserError."""
    alpha, run = options.alpha, examined.run
    if alpha is None and options.teacher not in (None, WITHOUT) and not run.uses_teacher:
        alpha = 1.0  # a teacher was asked for, and the run had none to say its share
    regulation = regulation_of(run, alpha, options.sharpness, options.teacher_sharpness)
    if examined.pairs.teacher is None and regulation.alpha > 0:
        if options.alpha is not None:
            raise UserError(
                f"--alpha {options.alpha} needs a teacher, and {examined.path} has none; name one by --teacher"
            )
        regulation = replace(regulation, alpha=0.0)
    if regulation.even:
        say(f"note: all negatives of {examined.path} weigh alike at its settings; --sharpness and --alpha change that")
    return regulation


def described(regulation: Regulation) -> dict[str, float | None]:
    """Return a regulation's parameters as values for JSON."""
    return {
        "alpha": regulation.alpha,
        "sharpness": regulation.sharpness,
        "teacher_sharpness": regulation.teacher_sharpness,
        "negative_mass": regulation.negative_mass,
        "drop_below": regulation.drop_below,
    }


def batch_of(subject: Subject) -> int:
    """Return how many images pass through the model at a time."""
    return 256 if subject.run.model.image_size <= 128 else 64


def _of_features(path: str, options: argparse.Namespace) -> Examined:
    pairs = Pairs.load(path)
    if options.shards is not None or options.save_features:
        name = "--shards" if options.shards is not None else "--save-features"
        raise UserError(f"{name}: {path} already holds features; give the run in its place to compute others")
    if options.teacher == WITHOUT:
        pairs = replace(pairs, teacher_image=None, teacher_text=None)
    elif options.teacher is not None:
        raise UserError(f"--teacher: {path} holds features; give the run in its place for another teacher")
    config = Path(path) / CONFIG
    run = load_config(config if config.exists() else None, [])
    return Examined(path, pairs, run, None)
