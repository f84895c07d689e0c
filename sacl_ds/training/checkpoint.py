"""Checkpoints of a run: DeepSpeed's shards under checkpoints/step_N, a readable state beside them, `latest` last.

`latest` is written after every rank has finished, to a temporary file that is then renamed: whatever it names loads.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from deepspeed.runtime.engine import DeepSpeedEngine

from sacl_ds.distributed import barrier, rank, world_size
from sacl_ds.ds_config import zero_stage
from sacl_ds.errors import UserError

FOLDER, LATEST, STATE = "checkpoints", "latest", "state.json"


@dataclass(frozen=True)
class RunState:
    """Where a run stands. The step is also the position in the data and in every schedule."""

    step: int
    world: int
    zero_stage: int
    vocabulary: str  # the tokenizer's fingerprint


def save(engine: DeepSpeedEngine, run_folder: Path, step: int, vocabulary: str) -> None:
    """Save after `step` steps; every rank calls it."""
    folder = run_folder / FOLDER
    tag = f"step_{step:08d}"
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    barrier()
    if rank() == 0:
        state = RunState(step, world_size(), zero_stage(engine.config), vocabulary)
        _write(folder / tag / STATE, json.dumps(asdict(state), indent=2))
        _write(folder / LATEST, tag)
    barrier()


def latest(run_folder: Path) -> RunState | None:
    """The state of the newest complete checkpoint, or None."""
    try:
        tag = (run_folder / FOLDER / LATEST).read_text().strip()
        return RunState(**json.loads((run_folder / FOLDER / tag / STATE).read_text()))
    except FileNotFoundError:
        return None


def resume(engine: DeepSpeedEngine, run_folder: Path, vocabulary: str) -> int:
    """Load the newest checkpoint; returns the number of steps done. Every rank calls it."""
    state = latest(run_folder)
    if state is None:
        raise UserError(f"--resume: nothing to resume in {run_folder}; start without --resume")
    if state.vocabulary != vocabulary:
        raise UserError(
            f"--resume: the tokenizer in {run_folder} is not the one that its checkpoint was trained with; "
            "put it back, or start anew in another output_dir"
        )
    for name, was, now in (
        ("ranks", state.world, world_size()),
        ("ZeRO stage", state.zero_stage, zero_stage(engine.config)),
    ):
        if was != now:
            raise UserError(f"--resume: {run_folder} was saved with {name} {was}, not {now}; resume with {was}")
    tag = f"step_{state.step:08d}"
    loaded, _ = engine.load_checkpoint(str(run_folder / FOLDER), tag=tag)
    if loaded is None:
        raise UserError(f"--resume: the checkpoint {run_folder / FOLDER / tag} cannot be loaded")
    return state.step


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
