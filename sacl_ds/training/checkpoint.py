"""Checkpoints of a run: DeepSpeed's shards under checkpoints/step_N, a readable state beside them, `latest` last.

`latest` is written after every rank has finished, to a temporary file that is then renamed: whatever it names loads.
"""

from __future__ import annotations

import io
import json
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file

from sacl_ds.atomic import write_text
from sacl_ds.distributed import barrier, rank, same_error, world_size
from sacl_ds.ds_config import zero_stage
from sacl_ds.errors import UserError
from sacl_ds.model.momentum import Momentum
from sacl_ds.model.saved import write_tensors
from sacl_ds.training.engine import fill_parameters, whole_parameters

FOLDER, LATEST, STATE, MOMENTUM = "checkpoints", "latest", "state.json", "momentum.safetensors"
FROZEN = "frozen.safetensors"  # what is not trained, which DeepSpeed's conversion to other ranks leaves out
_UNIVERSAL = {"universal_checkpoint_version": 0.2}
_CONVERTED = "_universal"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. vocabulary: the tokenizer's fingerprint; data: the global order's."""

    vocabulary: str
    data: str


@dataclass(frozen=True)
class RunState:
    """Where a run stands. The step is also the position in the data and in every schedule."""

    step: int
    world: int
    zero_stage: int
    vocabulary: str
    data: str = ""


def save(
    engine: DeepSpeedEngine,
    run_folder: Path,
    step: int,
    identity: Identity,
    momentum: Momentum | None = None,
    keep: int | None = None,
) -> None:
    """Save after `step` steps; every rank calls it. keep: so many stay, the newest; None: all."""
    folder = run_folder / FOLDER
    tag = f"step_{step:08d}"
    # what DeepSpeed's conversion to another number of ranks asks for
    engine.save_checkpoint(str(folder), tag, {"universal_checkpoint_info": _UNIVERSAL}, save_latest=False)
    frozen = {}
    for name, value in whole_parameters(engine, engine.module, trained=False):  # all ranks take part in gathering
        if rank() == 0:
            frozen[name] = value.cpu().clone()
    barrier()
    if rank() == 0:
        if frozen:
            write_tensors(frozen, folder / tag / FROZEN)
        if momentum:  # the same on all ranks
            write_tensors(momentum.state(), folder / tag / MOMENTUM)
        state = RunState(step, world_size(), zero_stage(engine.config), identity.vocabulary, identity.data)
        write_text(folder / tag / STATE, json.dumps(asdict(state), indent=2))
        write_text(folder / LATEST, tag)
        for old in _complete(folder)[: -keep if keep else 0]:
            shutil.rmtree(old)
    barrier()


def _complete(folder: Path) -> list[Path]:
    """Checkpoints, the oldest first."""
    return sorted(state.parent for state in folder.glob(f"step_*/{STATE}"))


def latest(run_folder: Path) -> RunState | None:
    """The state of the newest complete checkpoint, or None."""
    try:
        tag = (run_folder / FOLDER / LATEST).read_text().strip()
        return RunState(**json.loads((run_folder / FOLDER / tag / STATE).read_text()))
    except FileNotFoundError:
        return None


def resume(
    engine: DeepSpeedEngine,
    run_folder: Path,
    identity: Identity,
    momentum: Momentum | None = None,
    id_columns: int = 1,
) -> tuple[int, str | None]:
    """Load the newest checkpoint, also one of another number of ranks; every rank calls it.

    id_columns: how many ids a pair has, for the queue of `momentum`.
    Returns the number of steps done, and a note where the data that follow are not those that would have followed.
    """
    state = latest(run_folder)
    if state is None:
        raise UserError(f"--resume: nothing to resume in {run_folder}; start without --resume")
    if state.vocabulary != identity.vocabulary:
        raise UserError(
            f"--resume: the tokenizer in {run_folder} is not the one that its checkpoint was trained with; "
            "put it back, or start anew in another output_dir"
        )
    stage = zero_stage(engine.config)
    if state.zero_stage != stage:
        was = state.zero_stage
        raise UserError(f"--resume: {run_folder} was saved with ZeRO stage {was}, not {stage}; resume with {was}")
    folder, tag = run_folder / FOLDER, f"step_{state.step:08d}"
    _resume_momentum(folder / tag / MOMENTUM, run_folder, momentum, id_columns)
    if state.world == world_size():
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    else:
        loaded = _load_from_other_ranks(engine, folder, tag)
    if loaded is None:
        raise UserError(f"--resume: the checkpoint {folder / tag} cannot be loaded")
    changed = state.data not in ("", identity.data)
    note = "the data or their order are not those of the checkpoint, so this epoch repeats or misses samples"
    return state.step, note if changed else None


def _resume_momentum(file: Path, run_folder: Path, momentum: Momentum | None, id_columns: int) -> None:
    """Into `momentum`. Raises UserError where the run had one and now has none, or the other way round."""
    if file.exists() != (momentum is not None):
        had = file.exists()
        raise UserError(
            f"--resume: {run_folder} was trained {'with' if had else 'without'} a momentum model; resume with "
            f"momentum.enabled={str(had).lower()}, or start anew in another output_dir"
        )
    if momentum is None:
        return
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume: {file} cannot be read: {error}; take another checkpoint of this run") from None
    momentum.restore(saved, str(run_folder), id_columns)


def _load_from_other_ranks(engine: DeepSpeedEngine, folder: Path, tag: str) -> str | None:
    """By way of DeepSpeed's universal format, written beside the checkpoint and removed again.

    Under ZeRO 3, DeepSpeed then gives every parameter group the settings of the first (learning rate, weight decay) and
    one step counter to all, which each group's update advances: both are put right here.
    """
    settings = [
        {name: value for name, value in group.items() if name != "params"} for group in engine.optimizer.param_groups
    ]
    universal = f"{tag}{_CONVERTED}"
    with same_error():
        if rank() == 0:
            _convert(folder / tag, folder / universal)
    engine._config.load_universal_checkpoint = True
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=universal)
    finally:
        engine._config.load_universal_checkpoint = False
        barrier()
        if rank() == 0:
            shutil.rmtree(folder / universal, ignore_errors=True)
    if (folder / tag / FROZEN).exists():
        fill_parameters(engine, load_file(folder / tag / FROZEN))
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(step := state.get("step"), torch.Tensor):
            state["step"] = step.clone()
    return loaded


def _convert(saved: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)  # of a start that died here
    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    options = Namespace(
        input_folder=str(saved), output_folder=str(to), strict=True, inject_missing_state=True, **settings
    )
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            ds_to_universal.main(options)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"--resume: {saved} cannot be converted to {world_size()} ranks: {error}") from error
    (saved.parent / "latest_universal").unlink(missing_ok=True)
