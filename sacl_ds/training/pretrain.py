"""Pre-training from a configuration to a finished run directory: the teacher phase where asked for, then the run."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from rich.text import Text
from safetensors import SafetensorError

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import TrainingView, View
from sacl_ds.data.collate import Collator
from sacl_ds.data.grouping import Grouping
from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.shards.index import ShardIndex
from sacl_ds.data.sources import data_fingerprint, global_order, training_index, training_source
from sacl_ds.data.teacher_features import FeatureFolder, FeatureReader
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView, TrainView
from sacl_ds.distributed import barrier, broadcast_object, rank, same_error, world_size
from sacl_ds.errors import UserError
from sacl_ds.faults.guard import Guard, guarding
from sacl_ds.model.momentum import Momentum, saved_bytes
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import CONFIG, TOKENIZER, WEIGHTS, save_weights
from sacl_ds.model.starts.report import StartReport
from sacl_ds.model.starts.start import load_starts, tokenizer_source, with_positions
from sacl_ds.model.teacher import Teacher, load_teacher
from sacl_ds.telemetry.metrics import MetricLog
from sacl_ds.telemetry.plots import plot_run
from sacl_ds.telemetry.progress import RunProgress, counting, duration, retrieval_table
from sacl_ds.telemetry.weight_records import WeightRecords
from sacl_ds.training import checkpoint
from sacl_ds.training.checkpoint_folder import latest
from sacl_ds.training.engine import build_engine, ranks, whole_state
from sacl_ds.training.false_share import with_falling_weights
from sacl_ds.training.job import Job, describe_start
from sacl_ds.training.loop import Figures, Loop
from sacl_ds.training.model_flops import pair_flops
from sacl_ds.training.objectives import PretrainObjective
from sacl_ds.training.preparation import prepare_model
from sacl_ds.training.pretrain_work import PretrainWork
from sacl_ds.training.run_folder import (
    TEACHER,
    check_space,
    limits,
    newest,
    open_run_folder,
    require_shared,
    with_saved_positions,
)

START = "start.txt"  # what the model started from
_VOCABULARY_CAPTIONS = 100_000


class Evaluator(Protocol):
    def __call__(self, model: SaclModel, view: View, device: torch.device) -> Figures:
        """{name: (value, chance)}; every rank calls it."""


Evaluators = Callable[[RunConfig], Evaluator | None]


def teacher_phase(run: RunConfig) -> RunConfig:
    """H_beta: the same model, trained with plain InfoNCE; on clean captions where teacher.shards or teacher.detail name
    them."""
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


def pretrain(run: RunConfig, job: Job, evaluators: Evaluators) -> Path:
    """Train to the end and return the run directory. evaluators: what a phase is judged by.

    Raises UserError, the same on every rank, and Stopped where it was asked to.
    """
    opened = None  # with the lock, which is held while this function runs
    with same_error():
        plan = job.engine_config(run, Path(run.output_dir or "."))
        if rank() == 0:
            opened = open_run_folder(run, job.resume)
            run = _with_positions(run, opened[0], job.resume)
    folder: Path
    folder, run = broadcast_object((opened[0], run) if opened else None)
    if opened:
        print(describe_start(job, plan), flush=True)
    require_shared(folder)
    with same_error():
        checkpointed = newest(folder)
    with guarding(folder, ranks(), limits(run), checkpointed) as guard:
        _train_all(run, folder, job, evaluators, guard)
    if opened:
        opened[1].close()
    return folder


def _train_all(run: RunConfig, folder: Path, job: Job, evaluators: Evaluators, guard: Guard) -> None:
    """The teacher phase where asked for, then the run."""
    started = time.monotonic()
    index = _index(run)
    with same_error():
        if rank() == 0:
            if not job.resume:
                shutil.rmtree(folder / TOKENIZER, ignore_errors=True)  # of a start that died early
            _keep_tokenizer(run, folder, index)
            if _trains_teacher(run):
                shutil.copytree(folder / TOKENIZER, folder / TEACHER / TOKENIZER, dirs_exist_ok=True)
    teacher_folder = run.teacher.checkpoint
    if _trains_teacher(run):
        inner = folder / TEACHER
        if not broadcast_object((inner / WEIGHTS).exists()):  # nodes may not see the same files at once
            going_on = broadcast_object(job.resume and latest(inner) is not None)
            first = teacher_phase(run)
            own = _index(first) if run.teacher.shards else index
            _phase(Phase(first, inner, "teacher", own, resume=going_on), job, evaluators, guard)
        teacher_folder = str(inner)
    resume = broadcast_object(job.resume and latest(folder) is not None)
    phase = Phase(run, folder, "training", index, teacher_folder if run.uses_teacher else None, resume)
    result, progress = _phase(phase, job, evaluators, guard)
    if rank() == 0:
        plots = plot_run(folder)
        if result:
            progress.print(retrieval_table(f"after {run.train.steps} steps", result))
        seconds = time.monotonic() - started
        progress.print(f"done in {duration(seconds)}; run directory {folder}, plots {', '.join(p.name for p in plots)}")


def _trains_teacher(run: RunConfig) -> bool:
    return run.uses_teacher and run.teacher.checkpoint is None


@dataclass(frozen=True)
class Phase:
    """One training from start to end in its own directory, which already holds the tokenizer."""

    run: RunConfig
    folder: Path
    title: str
    index: ShardIndex | None  # the counted shards; None for scenes
    teacher: str | None = None  # run directory of the frozen teacher
    resume: bool = False


def _phase(phase: Phase, job: Job, evaluators: Evaluators, guard: Guard) -> tuple[Figures, RunProgress]:
    """Build everything of one phase, train, and leave the finished run in its directory."""
    run, folder, resume = phase.run, phase.folder, phase.resume
    first, world = rank() == 0, world_size()
    progress = RunProgress(phase.title, run.train.steps, 0, enabled=first)
    with same_error():
        engine_config = job.engine_config(run, folder)
        source = training_source(run, phase.index)
        tokenizer = Tokenizer.load(folder / TOKENIZER, run.model.max_tokens)
        teacher = load_teacher(phase.teacher, job.device) if phase.teacher else None
        grouping = Grouping.load(Path(run.data.grouping)) if run.data.grouping else None
        features = _stored(run, phase, teacher) if teacher and run.teacher.features else None
        model, begun = _model(phase, tokenizer)
        evaluator = evaluators(run)
        if first:
            _announce(run, folder, model, begun, progress)
    prepare_model(model, run, engine_config)
    canonical = View(CanonicalView(run.model.image_size), tokenizer)
    order = global_order(run, source)
    collator = Collator(
        TrainingView(_training_view(run), tokenizer),
        run.seed,
        run.loss.mlm_probability if run.loss.mlm_weight else None,
        teacher.view if teacher and not features else None,
        features,
        run.data.duplicates,
        grouping,
    )
    if run.loss.false_share is not None and teacher:
        beginning = BatchLoader(source, order, collator, rank=rank(), world=world, workers=0)
        run, said = with_falling_weights(run, iter(beginning), teacher, job.device)
        progress.print(said)
    if first:
        run.model_copy(update={"output_dir": str(folder)}).save(folder / CONFIG)
    momentum = _momentum(run, model, teacher, job.device)
    engine = build_engine(PretrainObjective(model, run.loss), engine_config, run.optim)
    identity = checkpoint.Identity(tokenizer.fingerprint, data_fingerprint(order, phase.index), run.seed)
    with same_error():
        beside = momentum, collator.id_columns
        start, note = checkpoint.resume(engine, folder, identity, *beside) if resume else (0, None)
        records = WeightRecords(folder, start if resume else None) if first else None
    guard.begin(start if resume else None)
    if note:
        progress.print(f"warning: --resume: {note}")
    loader = BatchLoader(
        source,
        order,
        collator,
        rank=rank(),
        world=world,
        workers=job.workers(run.data.workers),
        start_step=start,
        pin_memory=not job.machine.on_cpu,
    )
    loop = Loop(
        run=run,
        folder=folder,
        identity=identity,
        engine=engine,
        batches=iter(loader),
        device=job.device,
        work=PretrainWork(run, teacher, momentum, sum(map(sum, source.sets)), records),
        evaluate=(lambda step: evaluator(model, canonical, job.device)) if evaluator else None,
        log=MetricLog(folder / "metrics.jsonl", start if resume else None) if first else None,
        progress=progress,
        max_bad_share=run.data.max_bad_share,
        guard=guard,
        row_flops=pair_flops(run, tokenizer.size),
    )
    try:
        result = loop.train(start)
    finally:
        progress.close()
        loader.close()
    if speed := loop.throughput.summary():
        progress.print(f"{phase.title}: {speed}")
    guard.at(run.train.steps, "ending")
    _leave(engine, model, folder, run.train.steps)
    return result, progress


def _leave(engine: DeepSpeedEngine, model: SaclModel, folder: Path, steps: int) -> None:
    """The finished weights in the run's directory, and no engine."""
    weights = whole_state(engine, model)
    with same_error():
        if rank() == 0:
            try:
                save_weights(weights, folder, steps)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{folder / WEIGHTS} cannot be written: {error}; the checkpoint of step {steps} is whole: make "
                    "room, and --resume writes it"
                ) from None
    engine.destroy()
    barrier()


def _announce(run: RunConfig, folder: Path, model: SaclModel, begun: StartReport | None, progress: RunProgress) -> None:
    """What is to be known before training: room on the disk, what the model starts from, a leak. For rank 0."""
    if warning := _check_space(run, folder, model):
        progress.print(f"warning: {warning}")
    if model.captions_choose:
        progress.print(
            "warning: model.patch_selection.placement=published: each image's patches are chosen by its own caption "
            "before ITC, "
            "which can find the pair by what was chosen; retrieval without captions has no such help"
        )
    if begun and begun.sources:
        progress.print(Text(str(begun)))
        (folder / START).write_text(f"{begun}\n")


def _stored(run: RunConfig, phase: Phase, teacher: Teacher) -> FeatureReader:
    """The teacher's features, computed beforehand. Raises UserError where some are missing or of another teacher."""
    assert run.teacher.features is not None
    assert phase.index is not None
    folder = FeatureFolder(run.teacher.features, teacher.identity)
    if rank() == 0:
        folder.require_all(phase.index.shards)
    return FeatureReader(folder, phase.index.shards)


def _checkpoints(run: RunConfig) -> int:
    """How many a whole run writes."""
    return math.ceil(run.train.steps / run.train.save_every) if run.train.save_every else 1


def _check_space(run: RunConfig, folder: Path, model: SaclModel) -> str | None:
    """`check_space` of what this run writes; a teacher's features are taken to be as wide as the model's."""
    parameters = sum(p.numel() for p in model.parameters())
    widths = run.model.embed_dim, run.model.embed_dim if run.uses_teacher and run.momentum.regulate_queue else 0
    return check_space(folder, parameters, _checkpoints(run), saved_bytes(run.momentum, parameters, *widths))


def _training_view(run: RunConfig) -> CanonicalView | TrainView:
    if run.data.crops or run.data.flip:
        return TrainView(run.model.image_size, run.data.crop_scale if run.data.crops else (1.0, 1.0), run.data.flip)
    return CanonicalView(run.model.image_size)


def _model(phase: Phase, tokenizer: Tokenizer) -> tuple[SaclModel, StartReport | None]:
    """The same starting weights on every rank, from the seed or published ones; those of a resumed run follow."""
    run = phase.run
    torch.manual_seed(run.seed)
    model = SaclModel(run.model, tokenizer.size, pretrained=not phase.resume)
    return model, None if phase.resume else load_starts(model, run.model)


def _with_positions(run: RunConfig, folder: Path, resume: bool) -> RunConfig:
    """The text positions of what the model starts from, or of what is resumed."""
    saved = with_saved_positions(run.model, folder) if resume else None
    return run.model_copy(update={"model": saved or with_positions(run.model)})


def _momentum(run: RunConfig, model: SaclModel, teacher: Teacher | None, device: torch.device) -> Momentum | None:
    """Of the model as it starts; its queue holds the teacher's features where it is regulated."""
    settings = run.momentum
    if not settings.enabled:
        return None
    queued = settings.queue_size > 0 and settings.regulate_queue
    return Momentum(model, settings, device, teacher.identity if teacher and queued else "")


def _index(run: RunConfig) -> ShardIndex | None:
    """The shards that the run trains on, as the first rank counts them, on every rank."""
    with same_error():
        index = None
        if rank() == 0:
            with counting("counting the samples of shards") as done:
                index = training_index(run, done)
    return broadcast_object(index)


def _keep_tokenizer(run: RunConfig, folder: Path, index: ShardIndex | None) -> None:
    """Put the run's tokenizer into its directory: that of what the model starts from, or one trained on captions."""
    kept = folder / TOKENIZER
    if kept.exists():
        return
    source = tokenizer_source(run.model)
    if source:
        Tokenizer.load(source[0], run.model.max_tokens, source[1]).save(kept)
        return
    trained = train_wordpiece(training_source(run, index).captions(_VOCABULARY_CAPTIONS), run.model.vocab_size)
    Tokenizer(trained, run.model.max_tokens).save(kept)
