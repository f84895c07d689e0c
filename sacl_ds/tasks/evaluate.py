"""Evaluation of a checkpoint on a task: a table, results.json, and the task's own files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.text import Tokenizer
from sacl_ds.distributed import barrier, broadcast_object, raise_on_all_ranks, rank, world_size
from sacl_ds.errors import UserError
from sacl_ds.files import write_text
from sacl_ds.model.sacl import autocast
from sacl_ds.model.saved import TOKENIZER
from sacl_ds.tasks.configuration import run_of, saved_state, trained_model
from sacl_ds.tasks.task import EvaluationContext, Outcome, Task, task_of
from sacl_ds.telemetry.progress import RunProgress, counting_stages, duration

RESULTS = "results.json"


def evaluate(run: FinetuneConfig, device: torch.device) -> Path:
    """Evaluate run.checkpoint; returns the directory of the results. Raises UserError, the same on every rank."""
    assert run.checkpoint is not None
    theirs = run_of(run.checkpoint)
    progress = RunProgress(run.task, 0, 0, enabled=rank() == 0)
    with raise_on_all_ranks():
        task = task_of(run)
        task.take(theirs)
        split = _split(task)
        tokenizer = Tokenizer.load(theirs / TOKENIZER, run.model.max_tokens)
        state, step = saved_state(run.checkpoint)
        model = trained_model(task, tokenizer, state, f"checkpoint={run.checkpoint}")
        if rank() == 0:
            folder = Path(run.output_dir) if run.output_dir else theirs / "evaluation" / f"{run.title}-{split}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"output_dir={folder} cannot be made: {error.strerror}") from None
    folder = broadcast_object(folder if rank() == 0 else None)
    outcome, seconds = evaluated(task, model, tokenizer, split, device)
    about = {"checkpoint": run.checkpoint, "step": step, "seconds": round(seconds, 1)}
    with raise_on_all_ranks():
        if rank() == 0:
            progress.print(report(task, outcome, folder, split, about))
    progress.print(f"done in {duration(seconds)} on {world_size()} ranks; results in {folder}")
    barrier()
    return folder


def evaluated(task: Task, model: Any, tokenizer: Tokenizer, split: str, device: torch.device) -> tuple[Outcome, float]:
    """Evaluate the whole split, with a bar on the first rank; returns the seconds too. Every rank calls it."""
    begin = time.monotonic()
    model = model.eval().to(device)
    with counting_stages(enabled=rank() == 0) as done:
        outcome = judged(task, model, split, EvaluationContext(tokenizer, device, done=done))
    return outcome, time.monotonic() - begin


def judged(task: Task, model: Any, split: str, seen: EvaluationContext) -> Outcome:
    """Evaluate a task in the precision of training; every rank calls it."""
    with autocast(seen.device, task.run.train.precision):
        return task.evaluate(model, split, seen)


def report(task: Task, outcome: Outcome, folder: Path, split: str, about: Mapping[str, Any]) -> Group:
    """Write results.json and the task's files; returns what to show. Only rank 0 calls it."""
    files = outcome.write(folder)
    figures = {name: {"value": value, "chance": chance} for name, (value, chance) in outcome.figures.items()}
    values = {"task": task.run.task, "split": split, **about, "figures": figures, "notes": outcome.notes}
    write_text(folder / RESULTS, json.dumps(values | {"files": [path.name for path in files]}, indent=2) + "\n")
    lines = [Text(note) for note in outcome.notes]
    if files:
        lines.append(Text(f"written: {', '.join(path.name for path in files)}"))
    table = [figure_table(f"{task.run.task}, {split}", outcome.figures)] if outcome.figures else []
    return Group(*table, *lines)


def figure_table(title: str, figures: Mapping[str, tuple[float, float]]) -> Table:
    """Make a table of metrics in per cent, beside the score of chance or of a model that sees no picture."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("%", justify="right")
    table.add_column("chance %", justify="right")
    for name, (value, chance) in figures.items():
        label = name.replace("_to_", "→").replace("_", " ")
        table.add_row(label, f"{100 * value:.1f}", "" if math.isnan(chance) else f"{100 * chance:.1f}")
    return table


def _split(task: Task) -> str:
    """Return the split that is asked for, or val where a task has no test files. Raises UserError where there is
    nothing."""
    asked = task.run.evaluation.split
    for split in (asked, "val") if asked == "test" else (asked,):
        if task.count(split):
            return split
    raise UserError(
        f"nothing to evaluate on: data.source=files, and the room {task.run.task} names no files of {asked}; give "
        "them, or data.source=scenes"
    )
