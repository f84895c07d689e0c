"""Saving and resuming of a run whose engine is at hand; `checkpoint_folder` describes a checkpoint on the disk.

Every rank writes what it owns, at any ZeRO stage, and reads what it will own, at any other: other numbers of ranks and
other stages need no conversion. DeepSpeed's own files are neither written nor read: they are pickles, fit one number of
ranks, and leave out what is not trained (0.19.8).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sacl_ds.distributed import barrier, broadcast_object, gather_objects, raise_on_all_ranks, rank, world_size
from sacl_ds.ds_config import zero_stage
from sacl_ds.errors import FULL, UserError
from sacl_ds.files import Written, checksum, flush, write_text
from sacl_ds.model.saved import CONFIG, TOKENIZER
from sacl_ds.training import fragments
from sacl_ds.training.checkpoint_folder import (
    FOLDER,
    FROZEN,
    LATEST,
    MOMENTUM,
    STATE,
    Identity,
    Manifest,
    Retention,
    RunState,
    Standing,
    complete,
    frozen_tensors,
    incomplete,
    latest,
    rank_files,
    read_manifest,
    read_state,
    read_tensors,
    remove,
    state_json,
    sweep,
    tag_of,
    verify,
)
from sacl_ds.training.engine import fill_parameters, whole_parameters
from sacl_ds.training.tensor_files import Entry, Fragments, write_entries

if TYPE_CHECKING:  # not every run has one
    from sacl_ds.model.momentum import Momentum

_KEEP_ALL = Retention()


@dataclass(frozen=True)
class Resumed:
    """State of the loaded checkpoint, and notes on what differs from what its user may think."""

    state: RunState
    notes: list[str]


def save(
    engine: DeepSpeedEngine,
    run_folder: Path,
    step: int,
    identity: Identity,
    momentum: Momentum | None = None,
    keep: Retention = _KEEP_ALL,
    standing: Standing | None = None,
) -> None:
    """Save after `step` steps; every rank calls it. Raises UserError, on all, where it cannot be written: then the
    checkpoints before it are as they were."""
    checkpoints = run_folder / FOLDER
    writing, folder = checkpoints / f".{tag_of(step)}.writing", checkpoints / tag_of(step)
    frozen = _untrained(engine)
    standing = standing or Standing()
    with raise_on_all_ranks(), _room(run_folder, step):
        if rank() == 0:
            checkpoints.mkdir(parents=True, exist_ok=True)
            sweep(checkpoints)
            writing.mkdir()
    try:
        written: dict[str, Written] = {}
        with raise_on_all_ranks(), _room(run_folder, step):
            name = f"rank_{rank():05d}.safetensors"
            written[name] = write_entries(writing / name, fragments.entries(engine))
            if rank() == 0:
                state = RunState(
                    step=step, world=world_size(), zero_stage=zero_stage(engine.config), vocabulary=identity.vocabulary,
                    data=identity.data, optimizer_step=fragments.optimizer_step(engine), seed=identity.seed,
                    loss_scale=_loss_scale(engine), schedules=standing.schedules, figures=standing.figures,
                    versions=versions(), commit=commit(),
                )  # fmt: skip
                if momentum:  # the same on all ranks
                    tensors = momentum.state()
                    written[MOMENTUM] = write_entries(writing / MOMENTUM, (Entry.of(n, t) for n, t in tensors.items()))
                written |= _beside(writing, run_folder, state, frozen)
        files = {name: each for part in gather_objects(written) for name, each in part.items()}
        with raise_on_all_ranks(), _room(run_folder, step):
            if rank() == 0:
                Manifest(files, fragments.shapes(engine)).save(writing)
                flush(writing)
                _name(writing, folder, keep)
    except UserError:
        if rank() == 0:
            shutil.rmtree(writing, ignore_errors=True)
        raise
    barrier()


def _untrained(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Collect parameters that are not trained, and buffers of the model's state, on rank 0; every rank calls it."""
    found = {}
    for name, value in whole_parameters(engine, engine.module, trained=False):  # all ranks take part in gathering
        if rank() == 0:
            found[name] = value.cpu().clone()
    if rank() == 0:
        parameters = {name for name, _ in engine.module.named_parameters()}
        lasting = set(engine.module.state_dict()) - parameters
        found |= {name: value.detach() for name, value in engine.module.named_buffers() if name in lasting}
    return found


def _beside(writing: Path, run_folder: Path, state: RunState, frozen: dict[str, Tensor]) -> dict[str, Written]:
    """Write the files of a checkpoint that belong to no rank; returns their checksums."""
    written = {}
    if frozen:
        written[FROZEN] = write_entries(writing / FROZEN, (Entry.of(n, t) for n, t in frozen.items()))
    write_text(writing / STATE, state_json(state))
    kept = [run_folder / CONFIG, *(run_folder / TOKENIZER).rglob("*")]
    names = [str(path.relative_to(run_folder)) for path in kept if path.is_file()]
    for name in names:
        _copy(run_folder / name, writing / name)
    return written | {name: checksum(writing / name) for name in (STATE, *names)}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    flush(target)
    flush(target.parent)


def _name(writing: Path, folder: Path, keep: Retention) -> None:
    """Give the checkpoint its name, then point `latest` to it, then remove those that it supersedes."""
    checkpoints = folder.parent
    if folder.exists():  # written before a kill that came ahead of `latest`, or of a run that was set back
        remove(folder)
    writing.rename(folder)
    flush(checkpoints)
    write_text(checkpoints / LATEST, folder.name)
    flush(checkpoints)
    for step in keep.superseded([*_readable(checkpoints)]):
        if tag_of(step) != folder.name:
            remove(checkpoints / tag_of(step))


def _readable(checkpoints: Path) -> Iterator[RunState]:
    """Yield the states of complete checkpoints; damaged ones are skipped, so that they stay."""
    for path in complete(checkpoints):
        with suppress(UserError, FileNotFoundError):
            yield read_state(path)


@contextmanager
def _room(run_folder: Path, step: int) -> Iterator[None]:
    """Convert a full disk, and whatever else the system refuses, to one line."""
    try:
        yield
    except OSError as error:
        try:
            before = latest(run_folder)
            stands = f"the checkpoint of step {before.step} is whole" if before else "there is no checkpoint before it"
        except UserError as damaged:
            stands = str(damaged)
        what = "the disk is full" if error.errno in FULL else str(error)
        raise UserError(
            f"the checkpoint of step {step} cannot be written to {run_folder / FOLDER}: {what}; {stands}: make room, "
            "and go on with --resume"
        ) from None


def resume(
    engine: DeepSpeedEngine,
    run_folder: Path,
    identity: Identity,
    momentum: Momentum | None = None,
    id_columns: int = 1,
) -> Resumed:
    """Load the newest checkpoint, also one of other ranks or another ZeRO stage; every rank calls it.

    id_columns: how many ids a pair has, for the queue of `momentum`.
    """
    state: RunState
    notes: list[str]
    with raise_on_all_ranks():
        found = latest(run_folder) if rank() == 0 else None
        if rank() == 0 and found is None:
            raise UserError(f"--resume: nothing to resume in {run_folder}; start without --resume")
    passed_over = incomplete(run_folder / FOLDER, found.step) if found else []
    state, notes = broadcast_object((found, passed_over))  # nodes may not see the same file at once
    with raise_on_all_ranks():
        if state.vocabulary != identity.vocabulary:
            raise UserError(
                f"--resume: the tokenizer in {run_folder} is not the one that its checkpoint was trained with; "
                "put it back, or start anew in another output_dir"
            )
        folder = run_folder / FOLDER / tag_of(state.step)
        manifest = read_manifest(folder)
        verify(folder, sorted(manifest.files)[rank() :: world_size()], manifest)
        _require_same(manifest.shapes, fragments.shapes(engine), run_folder)
        _require_momentum(MOMENTUM in manifest.files, momentum is not None, run_folder)
        if momentum is not None:
            momentum.restore(read_tensors(folder / MOMENTUM), str(run_folder), id_columns)
        saved = Fragments(rank_files(folder, manifest))
    fragments.fill(engine, saved, state.optimizer_step)
    _fill_untrained(engine, frozen_tensors(folder, manifest))
    _restore_loss_scale(engine, state.loss_scale)
    engine.global_steps = state.step
    engine.skipped_steps = state.step - state.optimizer_step
    if state.data not in ("", identity.data):
        notes.append("the data or their order are not those of the checkpoint, so this epoch repeats or misses samples")
    return Resumed(state, notes)


def _require_same(saved: dict[str, tuple[int, ...]], now: dict[str, tuple[int, ...]], run_folder: Path) -> None:
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            was, is_now = (f"of shape {list(s[name])}" if name in s else "not trained" for s in (saved, now))
            raise UserError(
                f"--resume: the checkpoint in {run_folder} is of another model: {name} was {was}, and is {is_now}; "
                "resume with the model and the losses that it had, or start anew in another output_dir"
            )


def _fill_untrained(engine: DeepSpeedEngine, saved: dict[str, Tensor]) -> None:
    """Load parameters by way of the engine, which may have sharded them, and buffers in place."""
    buffers = dict(engine.module.named_buffers())
    for name, buffer in buffers.items():
        if name in saved:
            with torch.no_grad():
                buffer.copy_(saved[name])
    fill_parameters(engine, {name: value for name, value in saved.items() if name not in buffers})


def _require_momentum(had: bool, has: bool, run_folder: Path) -> None:
    """Raises UserError where the run had a momentum model and now has none, or the other way round."""
    if had != has:
        raise UserError(
            f"--resume: {run_folder} was trained {'with' if had else 'without'} a momentum model; resume with "
            f"momentum.enabled={str(had).lower()}, or start anew in another output_dir"
        )


def _loss_scale(engine: DeepSpeedEngine) -> dict[str, float]:
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return {name: float(value) for name, value in scaler.state_dict().items()} if scaler else {}


def _restore_loss_scale(engine: DeepSpeedEngine, saved: dict[str, float]) -> None:
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if scaler and saved:
        whole = {name: int(value) for name, value in saved.items() if name in ("growth_interval", "_growth_tracker")}
        scaler.load_state_dict(saved | whole)


PACKAGES = ("sacl_ds", "torch", "deepspeed", "transformers", "timm", "webdataset", "safetensors")


def versions() -> dict[str, str]:
    """Return {package: version}, Python's among them; "absent" where one is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """Return the git commit of this package's checkout, with "+" where tracked files differ; "" where it is none."""
    here = Path(__file__).resolve().parent
    try:
        named = _git(here, "rev-parse", "HEAD")
        tracked = _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        return named + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "") if tracked else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
