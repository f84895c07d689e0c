"""Pre-training from a configuration to a finished run directory: the teacher phase where asked for, then the run."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import Batch, View
from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.sources import training_data, training_index, training_source
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.distributed import broadcast_object, raise_on_all_ranks, rank, world_size
from sacl_ds.errors import UserError
from sacl_ds.faults.guard import Guard
from sacl_ds.files import unseal
from sacl_ds.model.cost import ModelCost
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import CONFIG, TOKENIZER, WEIGHTS, save_weights, seal_run
from sacl_ds.model.teacher import Teacher, load_teacher
from sacl_ds.telemetry.progress import RunProgress, counting, duration, retrieval_table
from sacl_ds.telemetry.records import WeightRecords
from sacl_ds.telemetry.throughput import RowFlops
from sacl_ds.training import schedules
from sacl_ds.training.checkpoint import Identity
from sacl_ds.training.engine import consolidated_state_dict, prepare_model, whole_parameters
from sacl_ds.training.health import Cautions, optimizer_step
from sacl_ds.training.objective import PretrainObjective, step_regulation
from sacl_ds.training.records import step_record
from sacl_ds.training.run import RECORDS, START, Job, opened, train
from sacl_ds.training.run_folder import TEACHER, check_space, with_saved_positions
from sacl_ds.training.step import FrozenModels, Losses, Step, contrastive_step, rows_not_finite
from sacl_ds.training.task import Figures, Training, TrainingTask

if TYPE_CHECKING:
    from sacl_ds.data.shards.index import ShardIndex
    from sacl_ds.model.momentum import Momentum
    from sacl_ds.model.starts.report import StartReport

_SPECIAL = 2  # [CLS] and [SEP], which MLM never predicts


def pair_flops(run: RunConfig, vocab_size: int) -> RowFlops | None:
    """Return FLOPs of forward and backward a pair, by its caption's length; None if the image encoder's are unknown."""

    try:
        cost = ModelCost(run.model, vocab_size=vocab_size)
    except UserError:
        return None

    def flops(tokens: int) -> float:
        predicted = run.loss.mlm_probability * (tokens - _SPECIAL)
        return cost.with_texts(tokens, predicted).pretraining(run.losses).training_flops

    return RowFlops.through(flops)


_VOCABULARY_CAPTIONS = 100_000


class Evaluator(Protocol):
    def __call__(self, model: SaclModel, view: View, device: torch.device) -> Figures:
        """Evaluate the model: {name: (value, chance)}; every rank calls it."""


Evaluators = Callable[[RunConfig], Evaluator | None]


@dataclass
class PretrainTask(TrainingTask):
    """Training steps of pre-training, with the records of their weights.

    epoch_pairs: pairs of the data, once through. judge: the figures of the model as it stands; None: nothing held out.
    """

    run: RunConfig
    folder: Path
    frozen: FrozenModels
    epoch_pairs: int
    judge: Callable[[], Figures] | None
    rows: str = "pairs"

    def __post_init__(self) -> None:
        self.momentum = self.frozen.momentum
        self._cautions = Cautions(self.run)

    def begin(self, engine: DeepSpeedEngine, resumed_at: int | None) -> None:
        self._records = WeightRecords(self.folder, resumed_at) if rank() == 0 else None

    def step(self, engine: DeepSpeedEngine, batch: Batch, step: Step) -> tuple[Losses, Tensor | None, str | None]:
        done = step.number + 1
        recorded = schedules.is_recorded(done, self.run.train.steps, self.run.records)
        alpha, soft_weight = self._shares(step.number)
        step = replace(step, alpha=alpha, soft_weight=soft_weight, statistics=step.logged or recorded)
        losses, features, targets = contrastive_step(engine, batch, step, self.frozen)
        if not optimizer_step(engine, losses["loss"]):
            return losses, rows_not_finite(engine, batch, step), None
        if self.momentum and targets.keys:
            self.momentum.update(whole_parameters(engine, engine.module.model))
            self.momentum.push(targets.keys.image, targets.keys.text, batch.pair_ids, targets.teacher)
        if not recorded:
            return losses, None, None
        regulation = step_regulation(self.run.loss, targets)[0]
        lowest = self.run.records.lowest
        figures, pairs = step_record(features, targets.teacher, regulation, losses, batch, lowest)
        with raise_on_all_ranks():
            if self._records:
                self._records.write(done, figures, pairs)
        return losses, None, self._cautions.of_weights(done, regulation.alpha, figures)

    def names(self, batch: Batch) -> list[str]:
        return [f"{shard}:{key}" if shard else key for shard, key in zip(batch.shards, batch.keys, strict=True)]

    def schedules(self, step: int) -> dict[str, float]:
        alpha, soft_weight = self._shares(step)
        found = {"alpha": alpha} if self.frozen.teacher else {}
        if self.momentum:
            found |= {"momentum_weight": soft_weight, "queue_fill": self.momentum.fill}
        return found

    def _shares(self, step: int) -> tuple[float, float]:
        """Return the teacher's share of the similarity and the momentum model's of the targets; 0 without one."""
        return (
            schedules.alpha(step, self.run) if self.frozen.teacher else 0.0,
            schedules.soft_weight(step, self.run, self.epoch_pairs) if self.momentum else 0.0,
        )

    def caution(self, done: int, figures: dict[str, Any]) -> str | None:
        return self._cautions.of_scale(done, figures.get("alpha", 0.0), figures["logit_scale"])

    def evaluate(self, done: int) -> Figures:
        return self.judge() if self.judge else {}

    def finish(self, engine: DeepSpeedEngine) -> None:
        weights, steps = consolidated_state_dict(engine, engine.module.model), self.run.train.steps
        with raise_on_all_ranks():
            if rank() == 0:
                try:
                    save_weights(weights, self.folder, steps)
                    seal_run(self.folder, *RECORDS)
                except (OSError, SafetensorError) as error:
                    raise UserError(
                        f"{self.folder / WEIGHTS} cannot be written: {error}; the checkpoint of step {steps} is whole: "
                        "make room, and --resume writes it"
                    ) from None


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
        result, progress = _phase(phase, job, evaluators, guard)
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


@dataclass(frozen=True)
class Phase:
    """Training from start to end in its own directory, which already holds the tokenizer."""

    run: RunConfig
    folder: Path
    title: str
    index: ShardIndex | None  # the counted shards; None for scenes
    teacher: str | None = None  # run directory of the frozen teacher


def _phase(phase: Phase, job: Job, evaluators: Evaluators, guard: Guard) -> tuple[Figures, RunProgress]:
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
            _announce(run, folder, model, begun, progress)
    prepare_model(model, run, engine_config)
    if run.loss.false_share is not None and teacher:
        from sacl_ds.training.false_share import with_falling_weights

        beginning = BatchLoader(data.source, data.order, data.collator, rank=rank(), world=world_size(), workers=0)
        run, said = with_falling_weights(run, iter(beginning), teacher, job.device)
        progress.print(said)
    if rank() == 0:
        unseal(folder)
        run.model_copy(update={"output_dir": str(folder)}).save(folder / CONFIG)
    frozen = FrozenModels(teacher, _momentum(run, model, teacher, job.device), run.train.precision)
    canonical = View(CanonicalView(run.model.image_size), tokenizer)
    judge = (lambda: evaluator(model, canonical, job.device)) if evaluator else None
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
        pair_flops(run, tokenizer.size),
    )
    return train(training, job, guard, progress, resume), progress


def _announce(run: RunConfig, folder: Path, model: SaclModel, begun: StartReport | None, progress: RunProgress) -> None:
    """Print, before training, the disk's room, what the model starts from, and any leak. Only rank 0 calls it."""
    if warning := _check_space(run, folder, model):
        progress.print(f"warning: {warning}")
    if model.captions_choose:
        progress.print(
            "warning: model.patch_selection.placement=published: each image's patches are chosen by its own caption "
            "before ITC, "
            "which can find the pair by what was chosen; retrieval without captions has no such help"
        )
    if begun:
        progress.print(Text(str(begun)))
        (folder / START).write_text(f"{begun}\n")


def _check_space(run: RunConfig, folder: Path, model: SaclModel) -> str | None:
    """Run `check_space` for this run; a teacher's features are taken to be as wide as the model's."""
    parameters = sum(p.numel() for p in model.parameters())
    checkpoints = math.ceil(run.train.steps / run.train.save_every) if run.train.save_every else 1
    beside = 0
    if run.momentum.enabled:
        from sacl_ds.model.momentum import saved_bytes

        width = run.model.embed_dim
        queued = width if run.uses_teacher and run.momentum.regulate_queue else 0
        beside = saved_bytes(run.momentum, parameters, width, queued)
    return check_space(folder, parameters, checkpoints, beside)


def _with_positions(run: RunConfig, folder: Path, resume: bool) -> RunConfig:
    """Set the text positions of what the model starts from, or of what is resumed."""
    saved = with_saved_positions(run.model, folder) if resume else None
    if saved is None and run.model.starts_from_weights:
        from sacl_ds.model.starts.start import with_positions

        saved = with_positions(run.model)
    return run.model_copy(update={"model": saved}) if saved else run


def _momentum(run: RunConfig, model: SaclModel, teacher: Teacher | None, device: torch.device) -> Momentum | None:
    """Copy the initial model as the momentum model; its queue holds the teacher's features if it is regulated."""
    settings = run.momentum
    if not settings.enabled:
        return None
    from sacl_ds.model.momentum import Momentum

    queued = settings.queue_size > 0 and settings.regulate_queue
    return Momentum(model, settings, device, teacher.identity if teacher and queued else "")


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
