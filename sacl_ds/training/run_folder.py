"""Run directory: its name, its lock against other runs, its fit to what is resumed, and its room."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path
from typing import IO, Any

from sacl_ds.config import ModelConfig, TrainingConfig
from sacl_ds.distributed import broadcast_object, gather_objects, raise_on_all_ranks, rank
from sacl_ds.errors import SharedError, UserError
from sacl_ds.faults.heartbeat import Limits
from sacl_ds.files import require_unchanged
from sacl_ds.model.saved import CONFIG, WEIGHTS
from sacl_ds.training.checkpoint_folder import latest
from sacl_ds.yaml_files import plain_yaml

TEACHER = "teacher"  # the directory of the teacher phase, inside the run's
_LOCK = ".lock"
_BYTES_WEIGHTS, _BYTES_CHECKPOINT = 4, 12  # a parameter: fp32; with two moments


def open_run_folder(run: TrainingConfig, resume: bool) -> tuple[Path, IO[str]]:
    """Make and lock the run's directory, until the file that comes with it is closed. Only rank 0 calls it.

    Raises UserError where there is nothing to resume, a run to be overwritten, a run of another model, or another
    process at work.
    """
    folder = Path(run.output_dir) if run.output_dir is not None else _numbered(run, resume)
    holds = any(latest(f) is not None or (f / WEIGHTS).exists() for f in (folder, folder / TEACHER))
    if resume and not holds:
        raise UserError(
            f"--resume: nothing to resume in {folder} (no finished checkpoint there); start without --resume"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise UserError(f"output_dir={folder} cannot be made or written to: {error.strerror}") from None
    if not resume and holds:
        raise UserError(f"output_dir={folder} already holds a run; go on with --resume, or choose another output_dir")
    if resume:
        for place in (folder, folder / TEACHER):  # which are finished, where there is a manifest
            require_unchanged(place, f"--resume: {place}")
        _same_model(run, folder)
    return folder, lock


def newest(folder: Path) -> int | None:
    """Return the step that --resume would go on from."""
    state = latest(folder)
    return state.step if state else None


def limits(run: TrainingConfig) -> Limits:
    """Return how long ranks wait for each other."""
    return Limits(run.train.peer_timeout, run.train.step_timeout)


def require_shared(folder: Path, seconds: float = 10.0) -> None:
    """Check that every rank sees what rank 0 writes into `folder`. Every rank calls it; rank 0's folder exists.

    seconds: how long a file system over a network may take to show it. Raises UserError, the same on every rank, with
    the first rank that does not see it and its node.
    """
    own = (f".shared_{secrets.token_hex(8)}", str(folder), socket.gethostname()) if rank() == 0 else None
    token, name, writer = broadcast_object(own)
    written = folder / token
    with raise_on_all_ranks():
        if rank() == 0:
            try:
                written.touch()
            except OSError as error:
                raise UserError(f"output_dir={folder} cannot be written to: {error.strerror}") from None
    try:
        sees = _appears(written, seconds)
        answers = gather_objects((socket.gethostname(), sees))
    finally:
        if rank() == 0:
            written.unlink(missing_ok=True)
    for number, (node, seen) in enumerate(answers):
        if not seen:
            raise SharedError(
                f"output_dir={name} is not one folder on all nodes: rank {number} on {node} does not see what rank 0 "
                f"on {writer} writes there; choose a folder on a file system that all nodes mount"
            )


def _appears(path: Path, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def check_space(folder: Path, parameters: int, checkpoints: int, momentum_bytes: int = 0) -> str | None:
    """Check that the disk holds one checkpoint and the weights of a model with so many parameters.

    momentum_bytes: what a checkpoint takes besides, for the momentum model and its queue. Returns a warning where it
    holds that, but not all `checkpoints`. Raises UserError where it does not.
    """
    free = shutil.disk_usage(folder).free
    a_checkpoint = parameters * _BYTES_CHECKPOINT + momentum_bytes
    least = a_checkpoint + parameters * _BYTES_WEIGHTS
    if free < least:
        raise UserError(
            f"output_dir={folder}: {_gigabytes(free)} free, and one checkpoint with the weights takes "
            f"{_gigabytes(least)}; make room or choose another output_dir"
        )
    whole = a_checkpoint * checkpoints + parameters * _BYTES_WEIGHTS
    if free < whole:
        return (
            f"output_dir={folder}: {_gigabytes(free)} free, and {checkpoints} checkpoints take {_gigabytes(whole)}; "
            "make room, or set train.save_every higher"
        )
    return None


def _numbered(run: TrainingConfig, resume: bool) -> Path:
    """Return runs/TITLE-NNN: the next one, or the last one to be resumed."""
    base = Path("runs")
    used = [int(m[1]) for p in base.glob(f"{run.title}-*") if (m := re.fullmatch(r".*-(\d+)", p.name))]
    number = max(used, default=0)
    return base / f"{run.title}-{max(1, number if resume else number + 1):03d}"


def _lock(folder: Path) -> IO[str]:
    """Lock the folder for this process alone until it ends.

    A lock by `flock` would live on in loader workers, which outlast it for seconds.
    """
    file = (folder / _LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"output_dir={folder} is in use by another run ({holder}); wait for it, or choose another output_dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _same_model(run: TrainingConfig, folder: Path) -> None:
    """Check that the weights to be resumed are those of this configuration's model."""
    saved = _saved_model(folder)
    if saved is None:
        return  # stopped before its configuration was written, in the teacher phase
    for key, now in run.model.model_dump(mode="json").items():
        left_open = key == "max_positions" and now is None  # the saved configuration has it from the first start
        if key in saved and saved[key] != now and not left_open:
            raise UserError(
                f"--resume: {folder} holds a model with model.{key}={saved[key]}, not {now}; "
                f"resume with model.{key}={saved[key]}, or start anew in another output_dir"
            )


def with_saved_positions(model: ModelConfig, folder: Path) -> ModelConfig | None:
    """Set the text positions of the run that `folder` holds; None where no phase of it has begun."""
    for place in (folder, folder / TEACHER):
        saved = _saved_model(place)
        if saved is not None:
            return model.model_copy(update={"max_positions": saved.get("max_positions")})
    return None


def _saved_model(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(plain_yaml((folder / CONFIG).read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
