"""Fine-tuning for a downstream task: from a configuration to a run directory with the best weights and a table."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.distributed import barrier, raise_on_all_ranks, rank
from sacl_ds.errors import UserError
from sacl_ds.faults.guard import Guard
from sacl_ds.files import require_unchanged, unseal, write_text
from sacl_ds.model.saved import CONFIG, TOKENIZER, WEIGHTS, save_weights, seal_run
from sacl_ds.tasks.configuration import saved_state, starting_model, task_tokenizer, trained_model
from sacl_ds.tasks.evaluate import evaluated, judged, report
from sacl_ds.tasks.examples import example_order
from sacl_ds.tasks.task import EvaluationContext, Task, task_of
from sacl_ds.telemetry.plots import plot_run
from sacl_ds.telemetry.progress import RunProgress, duration
from sacl_ds.training.checkpoint_folder import Identity
from sacl_ds.training.engine import consolidated_state_dict, prepare_model
from sacl_ds.training.health import optimizer_step
from sacl_ds.training.run import RECORDS, START, Job, opened, train
from sacl_ds.training.run_folder import check_space
from sacl_ds.training.step import Losses, Step
from sacl_ds.training.task import Figures, Training, TrainingTask

BEST = "best.json"


class Best:
    """Keeper of the best weights. Its state is the same on all ranks, since the metrics are."""

    def __init__(self, folder: Path, main: str, resumed_at: int | None) -> None:
        """Begin anew, or go on from the folder's best.

        resumed_at: steps done by the resumed run; a later best is not taken over, since it will come again. Raises
        UserError where best.json cannot be read.
        """
        self.folder, self.main = folder, main
        self.step, self.value = 0, -math.inf
        file = folder / BEST
        if resumed_at is None or not file.exists():
            return
        require_unchanged(folder, f"--resume: {folder}", BEST)
        try:
            kept = json.loads(file.read_text())
            step, value, figure = int(kept["step"]), float(kept["value"]), str(kept["figure"])
            if not math.isfinite(value):
                raise ValueError(f"its value is {value}")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"--resume: {file} cannot be read: {error}; remove it, and the next best is kept") from None
        if step <= resumed_at and figure == main and (folder / WEIGHTS).exists():
            self.step, self.value = step, value

    def offer(self, step: int, figures: Figures, state: Callable[[], dict[str, Tensor]]) -> bool:
        """Keep the weights if `figures` are the best so far; every rank calls it. Returns whether they are.

        state: collective, whole on rank 0.
        """
        value = figures[self.main][0]
        if not value > self.value and self.step:
            return False
        self.step, self.value = step, value
        weights = state()
        if rank() == 0:
            save_weights(weights, self.folder, step)
            said = {name: figure[0] for name, figure in figures.items()}
            kept = {"step": step, "figure": self.main, "value": value, "figures": said}
            write_text(self.folder / BEST, json.dumps(kept, indent=2))
        barrier()
        return True


class FineTuning(TrainingTask):
    """Training steps of a downstream task; the best weights by its validation metrics stay in the run's directory."""

    def __init__(
        self, task: Task, model: nn.Module, seen: EvaluationContext, folder: Path, progress: RunProgress
    ) -> None:
        self.task, self.model, self.seen = task, model, seen
        self.folder, self.progress = folder, progress
        self.rows = task.rows

    def begin(self, engine: Any, resumed_at: int | None) -> None:
        self.engine, self.best = engine, Best(self.folder, self.task.main, resumed_at)

    def step(self, engine: Any, batch: Any, step: Step) -> tuple[Losses, Tensor | None, str | None]:
        losses = self.task.forward_backward(engine, batch, step)
        updated = optimizer_step(engine, losses["loss"])
        return losses, None if updated else torch.ones(len(batch), dtype=torch.bool), None

    def evaluate(self, done: int) -> Figures:
        main = self.task.main
        if not self.task.count("val"):
            return {}
        outcome = judged(self.task, self.model, "val", self.seen)
        for line in outcome.notes:
            self.progress.print(line)
        kept = self.best.offer(done, outcome.figures, lambda: consolidated_state_dict(self.engine, self.model))
        value = 100 * outcome.figures[main][0]
        self.progress.print(f"val at step {done}: {main} {value:.1f} %{', the best so far' if kept else ''}")
        return outcome.figures

    def finish(self, engine: Any) -> None:
        if not self.task.count("val"):  # nothing to choose by: the last
            last = {self.task.main: (0.0, 0.0)}
            self.best.offer(self.task.run.steps, last, lambda: consolidated_state_dict(engine, self.model))
        with raise_on_all_ranks():
            if rank() == 0:
                seal_run(self.folder, BEST, *RECORDS, *self.task.kept)


def finetune(run: FinetuneConfig, job: Job) -> Path:
    """Train to the end, then evaluate the best weights; returns the run directory. Raises UserError, on every rank."""
    with raise_on_all_ranks():
        task = task_of(run)
        run = task.run = _with_steps(run, task)
        _require_labels(task)
    with opened(run, job) as (_, folder, guard):
        _train_and_judge(task, folder, job, guard)
    return folder


def _train_and_judge(task: Task, folder: Path, job: Job, guard: Guard) -> None:
    started, run = time.monotonic(), task.run
    with raise_on_all_ranks():
        if rank() == 0:
            unseal(folder)
            _keep_tokenizer(task, folder, job.resume)
            task.keep(folder)
    resume = job.resumes(folder)
    progress = RunProgress(run.task, run.steps, 0, enabled=rank() == 0)
    tokenizer = Tokenizer.load(folder / TOKENIZER, run.model.max_tokens)
    train(_build(task, tokenizer, folder, job, progress, resume), job, guard, progress, resume)
    with raise_on_all_ranks():
        label = str(folder)
        model = trained_model(task, tokenizer, saved_state(label)[0], label)
    guard.at(run.steps, "evaluation")
    split = "test" if task.count("test") else "val"
    if task.count(split):
        outcome, seconds = evaluated(task, model, tokenizer, split, job.device)
        with raise_on_all_ranks():
            if rank() == 0:
                best = Best(folder, task.main, run.steps)
                about = {"checkpoint": str(folder), "step": best.step}
                progress.print(report(task, outcome, folder, split, about | {"seconds": round(seconds, 1)}))
    if rank() == 0:
        plots = plot_run(folder, run.task)
        spent = duration(time.monotonic() - started)
        progress.print(f"done in {spent}; run directory {folder}, plots {', '.join(p.name for p in plots)}")
    barrier()


def _with_steps(run: FinetuneConfig, task: Task) -> FinetuneConfig:
    """Set train.steps, eval_every and save_every as numbers, from the epochs. Raises UserError where nothing is to
    train on."""
    count, train = task.count("train"), run.train
    if not count:
        raise UserError(f"nothing to train on: data.source=files, and the room {run.task} names no training files")
    epoch = max(1, count // train.global_batch_size)
    steps = train.steps if train.steps is not None else max(1, round(train.epochs * count / train.global_batch_size))
    values = {
        "steps": steps,
        "eval_every": train.eval_every or epoch,
        "save_every": train.save_every or epoch,
        "keep_checkpoints": train.keep_checkpoints or 1,
    }
    # of a run cut short: the warm-up of the default length would take most of it
    optim = run.optim.model_copy(update={"warmup_steps": min(run.optim.warmup_steps, steps // 4)})
    return run.model_copy(update={"train": train.model_copy(update=values), "optim": optim})


def _require_labels(task: Task) -> None:
    """Raises UserError where there is nothing to learn from, or to choose the best weights by."""
    for split, what in (("train", "learn from"), ("val", "choose the best weights by")):
        if task.count(split) and not task.labelled(split):
            raise UserError(
                f"the files of {split} in the room {task.run.task} have no labels, so there is nothing to {what}; give "
                f"labelled ones{', or none' if split == 'val' else ''}"
            )


def _keep_tokenizer(task: Task, folder: Path, resume: bool) -> None:
    kept = folder / TOKENIZER
    if not resume:
        shutil.rmtree(kept, ignore_errors=True)  # of a start that died early
    if kept.exists():
        return
    begin, settings = task_tokenizer(task.run), task.run.model
    if begin is None:
        begin = Tokenizer(train_wordpiece(task.texts(), settings.vocab_size), settings.max_tokens)
    task.tokenizer(begin).save(kept)


def _build(task: Task, tokenizer: Tokenizer, folder: Path, job: Job, progress: RunProgress, resume: bool) -> Training:
    """Build all parts of the training."""
    run = task.run
    with raise_on_all_ranks():
        engine_config = job.engine_config(run, folder)
        begun, told = starting_model(run, tokenizer, resume)
        model: Any = task.model(begun, tokenizer)
        source, collator = task.training(tokenizer)
        if rank() == 0:
            _announce(run, folder, model, progress)
            if told and told.sources:
                said = "\n".join(filter(None, [str(told), task.origin]))
                progress.print(Text(said))
                (folder / START).write_text(f"{said}\n")
            run.model_copy(update={"output_dir": str(folder)}).save(folder / CONFIG)
    prepare_model(model, run, engine_config)
    order = example_order(source, run.train.global_batch_size, run.seed)
    seen = EvaluationContext(tokenizer, job.device, run.data.eval_count)
    return Training(
        run,
        folder,
        FineTuning(task, model, seen, folder, progress),
        engine_config,
        task.objective(model),
        source,
        order,
        collator,
        Identity(tokenizer.fingerprint, _data_fingerprint(order, run), run.seed),
        run.data.workers,
        run.data.max_bad_share,
    )


def _announce(run: FinetuneConfig, folder: Path, model: nn.Module, progress: RunProgress) -> None:
    """Check the room on the disk; only rank 0 calls it."""
    parameters = sum(p.numel() for p in model.parameters())
    if warning := check_space(folder, parameters, 2):  # a new checkpoint is written before the old one goes
        progress.print(f"warning: {warning}")


def _data_fingerprint(order: GlobalOrder, run: FinetuneConfig) -> str:
    """Return a digest that is equal for two runs to which the same steps bring the same examples."""
    rooms = run.model_dump(mode="json")
    said = [order.fingerprint, run.task, rooms["data"]["source"], rooms["data"]["scenes"], rooms[run.task]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
