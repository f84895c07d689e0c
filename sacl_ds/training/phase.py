"""One phase of pre-training, from its configuration to a finished run directory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sacl_ds.config import RunConfig
from sacl_ds.data.sources import training_data
from sacl_ds.data.text import Tokenizer
from sacl_ds.distributed import raise_on_all_ranks, rank
from sacl_ds.faults.guard import Guard
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import TOKENIZER, begin_run
from sacl_ds.model.teacher import load_teacher
from sacl_ds.telemetry.progress import RunProgress
from sacl_ds.training.checkpoint_folder import Identity
from sacl_ds.training.engine import prepare_model
from sacl_ds.training.objective import PretrainObjective
from sacl_ds.training.pretrain_task import PretrainTask, announce, frozen_models, pair_flops
from sacl_ds.training.run import Job, train
from sacl_ds.training.task import Evaluators, Figures, Training

if TYPE_CHECKING:
    from sacl_ds.data.shards.index import ShardIndex


@dataclass(frozen=True)
class Phase:
    """Training from start to end in its own directory, which already holds the tokenizer."""

    run: RunConfig
    folder: Path
    title: str
    index: ShardIndex | None  # the counted shards; None for scenes
    teacher: str | None = None  # run directory of the frozen teacher


def train_phase(phase: Phase, job: Job, evaluators: Evaluators, guard: Guard) -> tuple[Figures, RunProgress]:
    """Build all parts of one phase, train it, and leave the finished run in its directory."""
    run, folder, resume, begun = phase.run, phase.folder, job.resumes(phase.folder), None
    progress = RunProgress(phase.title, run.train.steps, 0, enabled=rank() == 0)
    with raise_on_all_ranks():
        engine_config = job.engine_config(run, folder)
        tokenizer = Tokenizer.load(folder / TOKENIZER, run.model.max_tokens)
        torch.manual_seed(run.seed)  # every rank starts from the same weights
        model = SaclModel(run.model, tokenizer.size, pretrained=not resume)
        if run.model.starts_from_weights and not resume:
            from sacl_ds.model.starts.start import load_starts

            begun = load_starts(model, run.model)
        teacher = load_teacher(phase.teacher, job.device) if phase.teacher else None
        seen = (teacher.view, teacher.identity if run.teacher.features else "") if teacher else None
        data = training_data(run, phase.index, tokenizer, seen, rank() == 0)
        evaluator = evaluators(run)
        if rank() == 0:
            announce(run, folder, model, begun, progress)
    prepare_model(model, run, engine_config)
    if run.loss.false_share is not None and teacher:
        from sacl_ds.training.false_share import with_falling_weights

        run, said = with_falling_weights(run, data, teacher, job.device)
        progress.print(said)
    if rank() == 0:
        begin_run(run.model_copy(update={"output_dir": str(folder)}), folder)
    frozen = frozen_models(run, model, teacher, job.device)
    judge = (lambda: evaluator(model, data.canonical, job.device)) if evaluator else None
    training = Training(
        run,
        folder,
        PretrainTask(run, folder, frozen, sum(map(sum, data.source.sets)), judge),
        engine_config,
        PretrainObjective(model, run.loss),
        data.source,
        data.order,
        data.collator,
        Identity(tokenizer.fingerprint, data.fingerprint, run.seed),
        run.data.workers,
        run.data.max_bad_share,
        data.collator.id_columns,
        cache(partial(pair_flops, run, tokenizer.size)),
    )
    return train(training, job, guard, progress, resume), progress
