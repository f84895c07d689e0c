"""Fine-tuning for a downstream task: from a configuration to a run directory with the best weights and a table."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import nn

from sacl_ds.config import FinetuneConfig
from sacl_ds.data.downstream.examples import example_order
from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.distributed import barrier, broadcast_object, rank, same_error, world_size
from sacl_ds.errors import UserError
from sacl_ds.faults.guard import Guard, guarding
from sacl_ds.model.saved import CONFIG, TOKENIZER
from sacl_ds.tasks.best import Best
from sacl_ds.tasks.evaluate import evaluated, judged, report
from sacl_ds.tasks.kinds import task_of
from sacl_ds.tasks.task import Seen, Task, TaskWork
from sacl_ds.tasks.weights import saved_state, starting_model, task_tokenizer, trained_model
from sacl_ds.telemetry.metrics import MetricLog
from sacl_ds.telemetry.plots import plot_run
from sacl_ds.telemetry.progress import RunProgress, duration
from sacl_ds.training import checkpoint
from sacl_ds.training.checkpoint_folder import latest
from sacl_ds.training.engine import build_engine, ranks, whole_state
from sacl_ds.training.job import Job, describe_start
from sacl_ds.training.loop import Figures, Loop
from sacl_ds.training.preparation import prepare_model
from sacl_ds.training.run_folder import check_space, limits, newest, open_run_folder, require_shared

START = "start.txt"  # what the model started from


def finetune(run: FinetuneConfig, job: Job) -> Path:
    """Train to the end, then look at the best weights; returns the run directory. Raises UserError, on every rank."""
    opened = None  # with the lock, which is held while this function runs
    with same_error():
        task = task_of(run)
        run = _with_steps(run, task)
        task.run = run
        _require_labels(task)
        plan = job.engine_config(run, Path(run.output_dir or "."))
        if rank() == 0:
            opened = open_run_folder(run, job.resume)
    folder: Path = broadcast_object(opened[0] if opened else None)
    if opened:
        print(describe_start(job, plan), flush=True)
    require_shared(folder)
    with same_error():
        checkpointed = newest(folder)
    with guarding(folder, ranks(), limits(run), checkpointed) as guard:
        _train_and_judge(task, folder, job, guard)
    if opened:
        opened[1].close()
    return folder


def _train_and_judge(task: Task, folder: Path, job: Job, guard: Guard) -> None:
    started, run = time.monotonic(), task.run
    with same_error():
        if rank() == 0:
            _keep_tokenizer(task, folder, job.resume)
            task.keep(folder)
    resume = broadcast_object(job.resume and latest(folder) is not None)  # nodes may not see the same files at once
    progress = RunProgress(run.task, run.steps, 0, enabled=rank() == 0)
    tokenizer = Tokenizer.load(folder / TOKENIZER, run.model.max_tokens)
    _train(task, tokenizer, folder, job, resume, progress, guard)
    with same_error():
        label = str(folder)
        model = trained_model(task, tokenizer, saved_state(label)[0], label)
    guard.at(run.steps, "evaluation")
    split = "test" if task.count("test") else "val"
    if task.count(split):
        outcome, seconds = evaluated(task, model, tokenizer, split, job.device)
        with same_error():
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
    """train.steps, eval_every and save_every as numbers, from the epochs. Raises UserError where nothing is to train
    on."""
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


def _train(
    task: Task, tokenizer: Tokenizer, folder: Path, job: Job, resume: bool, progress: RunProgress, guard: Guard
) -> None:
    """The steps; the best weights lie in the folder behind it."""
    run, first = task.run, rank() == 0
    with same_error():
        engine_config = job.engine_config(run, folder)
        begun, told = starting_model(run, tokenizer, resume)
        model: Any = task.model(begun, tokenizer)
        source, collator = task.training(tokenizer)
        has_val = task.count("val") > 0
        if first:
            _announce(run, folder, model, progress)
            if told and told.sources:
                said = "\n".join(filter(None, [str(told), task.origin]))
                progress.print(Text(said))
                (folder / START).write_text(f"{said}\n")
            run.model_copy(update={"output_dir": str(folder)}).save(folder / CONFIG)
    prepare_model(model, run, engine_config)
    order = example_order(source, run.train.global_batch_size, run.seed)
    engine = build_engine(task.objective(model), engine_config, run.optim)
    identity = checkpoint.Identity(tokenizer.fingerprint, _data_fingerprint(order, run), run.seed)
    with same_error():
        start, note = checkpoint.resume(engine, folder, identity) if resume else (0, None)
        best = Best(folder, task.main, start if resume else None)
    if note:
        progress.print(f"warning: --resume: {note}")
    loader = BatchLoader(
        source,
        order,
        collator,
        rank=rank(),
        world=world_size(),
        workers=job.workers(run.data.workers),
        start_step=start,
        pin_memory=not job.machine.on_cpu,
    )

    def evaluate(step: int) -> Figures:
        outcome = judged(task, model, "val", Seen(tokenizer, job.device, run.data.eval_count))
        for line in outcome.notes:
            progress.print(line)
        kept = best.offer(step, outcome.figures, lambda: whole_state(engine, model))
        value = 100 * outcome.figures[task.main][0]
        progress.print(f"val at step {step}: {task.main} {value:.1f} %{', the best so far' if kept else ''}")
        return outcome.figures

    loop = Loop(
        run=run,
        folder=folder,
        identity=identity,
        engine=engine,
        batches=iter(loader),
        device=job.device,
        work=TaskWork(task),
        evaluate=evaluate if has_val else None,
        log=MetricLog(folder / "metrics.jsonl", start if resume else None) if first else None,
        progress=progress,
        max_bad_share=run.data.max_bad_share,
        guard=guard,
    )
    try:
        loop.train(start)
    finally:
        progress.close()
        loader.close()
    if not has_val:  # nothing to choose by: the last
        best.offer(run.steps, {task.main: (0.0, 0.0)}, lambda: whole_state(engine, model))
    engine.destroy()
    barrier()


def _announce(run: FinetuneConfig, folder: Path, model: nn.Module, progress: RunProgress) -> None:
    """Room on the disk; for rank 0."""
    parameters = sum(p.numel() for p in model.parameters())
    if warning := check_space(folder, parameters, 2):  # a new checkpoint is written before the old one goes
        progress.print(f"warning: {warning}")


def _data_fingerprint(order: GlobalOrder, run: FinetuneConfig) -> str:
    """Equal for two runs to which the same steps bring the same examples."""
    rooms = run.model_dump(mode="json")
    said = [order.fingerprint, run.task, rooms["data"]["source"], rooms["data"]["scenes"], rooms[run.task]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
