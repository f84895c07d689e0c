"""Pre-training from a configuration to a finished run directory: the teacher phase where asked for, then the run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sacl_ds.config import RunConfig
from sacl_ds.data.sources import training_index, training_source
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.distributed import broadcast_object, raise_on_all_ranks, rank
from sacl_ds.faults.guard import Guard
from sacl_ds.model.saved import TOKENIZER, WEIGHTS
from sacl_ds.telemetry.progress import counting, duration, retrieval_table
from sacl_ds.training.phase import Phase, train_phase
from sacl_ds.training.run import Job, opened
from sacl_ds.training.run_folder import TEACHER, with_saved_positions
from sacl_ds.training.task import Evaluators

if TYPE_CHECKING:
    from sacl_ds.data.shards.index import ShardIndex

_VOCABULARY_CAPTIONS = 100_000


def pretrain(run: RunConfig, job: Job, evaluators: Evaluators) -> Path:
    """Train to the end and return the run directory. evaluators: what a phase is judged by.

    Raises UserError, the same on every rank, and Stopped where it was asked to.
    """
    with opened(run, job, lambda asked, folder: _with_positions(asked, folder, job.resume)) as (settled, folder, guard):
        _train_all(settled, folder, job, evaluators, guard)
    return folder


def _train_all(run: RunConfig, folder: Path, job: Job, evaluators: Evaluators, guard: Guard) -> None:
    """Train the teacher phase where it is asked for, then the run."""
    started = time.monotonic()
    trains_teacher = run.uses_teacher and run.teacher.checkpoint is None
    # nodes may not see the same files at once
    trained = trains_teacher and broadcast_object((folder / TEACHER / WEIGHTS).exists())
    teacher = str(folder / TEACHER) if trains_teacher else run.teacher.checkpoint if run.uses_teacher else None
    index = _index(run, folder, job)
    phases = [Phase(run, folder, "training", index, teacher)]
    if trains_teacher and not trained:
        first = teacher_phase(run)
        own = _index(first, folder / TEACHER, job) if run.teacher.shards else index
        phases.insert(0, Phase(first, folder / TEACHER, "teacher", own))
    with raise_on_all_ranks():
        if rank() == 0:
            if not job.resume:
                shutil.rmtree(folder / TOKENIZER, ignore_errors=True)  # of a start that died early
            _keep_tokenizer(run, folder, index)
            if trains_teacher:
                shutil.copytree(folder / TOKENIZER, folder / TEACHER / TOKENIZER, dirs_exist_ok=True)
    for phase in phases:
        result, progress = train_phase(phase, job, evaluators, guard)
    if rank() == 0:
        from sacl_ds.telemetry.plots import plot_run

        plots = plot_run(folder)
        if result:
            progress.print(retrieval_table(f"after {run.train.steps} steps", result))
        spent = duration(time.monotonic() - started)
        progress.print(f"done in {spent}; run directory {folder}, plots {', '.join(path.name for path in plots)}")


def teacher_phase(run: RunConfig) -> RunConfig:
    """Configure H_beta: the same model, trained with InfoNCE; on clean captions if teacher.shards or teacher.detail is
    set."""
    values = run.model_dump()
    values["loss"] |= {"contrastive": "infonce", "matching_weight": 0.0, "mlm_weight": 0.0, "false_share": None}
    values["train"] |= {"steps": run.teacher.steps, "save_every": None, "eval_every": None}
    values["optim"]["warmup_steps"] = min(run.optim.warmup_steps, run.teacher.steps // 4)
    values["data"]["scenes"] |= {"detail": run.teacher.detail, "seed": run.data.scenes.seed + 1}
    if run.teacher.shards:
        values["data"] |= {"shards": run.teacher.shards, "weights": None, "grouping": None}
    values["momentum"] |= {"enabled": False}
    values["teacher"] |= {"checkpoint": None, "steps": 0, "features": None}
    return RunConfig.model_validate(values)


def _with_positions(run: RunConfig, folder: Path, resume: bool) -> RunConfig:
    """Set the text positions of what the model starts from, or of what is resumed."""
    saved = with_saved_positions(run.model, folder) if resume else None
    if saved is None and run.model.starts_from_weights:
        from sacl_ds.model.starts.start import with_positions

        saved = with_positions(run.model)
    return run.model_copy(update={"model": saved}) if saved else run


def _index(run: RunConfig, folder: Path, job: Job) -> ShardIndex | None:
    """Count the run's shards on the first rank; returns the index on every rank."""
    resume = job.resumes(folder)
    with raise_on_all_ranks():
        index = None
        if rank() == 0:
            with counting("counting the samples of shards") as done:
                index = training_index(run, folder, resume, done)
            if index and index.missing:
                print(f"warning: {index.left_out}", flush=True)
    return broadcast_object(index)


def _keep_tokenizer(run: RunConfig, folder: Path, index: ShardIndex | None) -> None:
    """Put the run's tokenizer into its directory: that of what the model starts from, or one trained on captions."""
    kept = folder / TOKENIZER
    if kept.exists():
        return
    if run.model.starts_from_weights:
        from sacl_ds.model.starts.start import tokenizer_source

        if source := tokenizer_source(run.model):
            Tokenizer.load(source[0], run.model.max_tokens, source[1]).save(kept)
            return
    trained = train_wordpiece(training_source(run, index).captions(_VOCABULARY_CAPTIONS), run.model.vocab_size)
    Tokenizer(trained, run.model.max_tokens).save(kept)
