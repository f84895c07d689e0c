"""Checkpoint on the disk, without an engine: its content, its integrity, and which is the newest.

`RUN/checkpoints/step_N` holds no pickle: JSON, YAML and safetensors. It gets its name when all of it is written, so a
folder of that name is complete; `latest` names the one that --resume takes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sacl_ds.config import TrainConfig
from sacl_ds.errors import UserError
from sacl_ds.files import Written, first_changed, write_manifest
from sacl_ds.files import read_manifest as read_sealed
from sacl_ds.model import saved


class Judged(Protocol):
    """Interface of a checkpoint: its step, and held-out metrics of that step by name, where it was evaluated."""

    @property
    def step(self) -> int: ...

    @property
    def figures(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Retention:
    """Rule for the checkpoints to keep.

    newest: so many (None: all). every: those at multiples of so many steps, too. best: the one where the metric of this
    name is highest (the first of equals), too.
    """

    newest: int | None = None
    every: int | None = None
    best: str | None = None

    @classmethod
    def of(cls, train: TrainConfig) -> Retention:
        return cls(train.keep_checkpoints, train.keep_every, train.keep_best)

    def superseded(self, saved: list[Judged]) -> set[int]:
        """Return the steps of the checkpoints that may go, among all there are; never the newest."""
        if self.newest is None:
            return set()
        steps = sorted(each.step for each in saved)
        stay = set(steps[-self.newest :])
        if self.every:
            stay |= {step for step in steps if step % self.every == 0}
        if self.best:
            judged = [each for each in saved if not math.isnan(each.figures.get(self.best, math.nan))]
            best = max(judged, key=lambda each: (each.figures[self.best], -each.step), default=None)  # type: ignore[index]
            stay |= {best.step} if best else set()
        return set(steps) - stay


FOLDER, LATEST, STATE, MANIFEST = "checkpoints", "latest", "state.json", "manifest.json"
FROZEN, MOMENTUM = "frozen.safetensors", "momentum.safetensors"
FORMAT = 2  # 1 was DeepSpeed's own
_TAG = re.compile(r"step_([0-9]{8,})")


@dataclass(frozen=True)
class Identity:
    """Identity of a checkpoint's run. vocabulary: the tokenizer's fingerprint; data: the global order's."""

    vocabulary: str
    data: str
    seed: int = 0


@dataclass(frozen=True)
class Standing:
    """Values saved beside a run's state: schedules as they stand, held-out metrics of this step."""

    schedules: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunState:
    """State of a run. The step is also the position in the data, in every schedule, and of all random numbers."""

    step: int
    world: int
    zero_stage: int
    vocabulary: str
    data: str = ""
    optimizer_step: int = 0  # fewer than `step` where steps were skipped
    seed: int = 0
    loss_scale: dict[str, float] = field(default_factory=dict)  # of fp16
    schedules: dict[str, float] = field(default_factory=dict)  # alpha and others, as they stand
    figures: dict[str, float] = field(default_factory=dict)  # held out, at this step
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    format: int = FORMAT


@dataclass(frozen=True)
class Manifest:
    """Manifest of a checkpoint. files: of the checkpoint, but this one, which has its own checksum in it. shapes: of
    the trained parameters."""

    files: dict[str, Written]
    shapes: dict[str, tuple[int, ...]]

    def save(self, folder: Path) -> None:
        write_manifest(folder / MANIFEST, asdict(self))


def tag_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Parse the step from a checkpoint folder's name. Raises UserError for another name."""
    match = _TAG.fullmatch(folder.name)
    if match is None:
        raise UserError(f"{folder} is no checkpoint; give RUN/checkpoints/step_N, or RUN")
    return int(match[1])


def read_state(folder: Path) -> RunState:
    """Read RUN/checkpoints/step_N's state. Raises FileNotFoundError if there is none, UserError if it is unusable."""
    try:
        values = json.loads((folder / STATE).read_text())
        if values.get("format", 1) != FORMAT:
            raise UserError(
                f"the checkpoint {folder} is of another version of this program (format {values.get('format', 1)!r}, "
                f"not {FORMAT}); use that version, or start anew in another output_dir"
            )
        state = RunState(**values)
        kinds = {
            int: ("step", "world", "zero_stage", "optimizer_step", "seed", "format"),
            str: ("vocabulary", "data", "commit"),
            dict: ("loss_scale", "schedules", "figures", "versions"),
        }
        for kind, names in kinds.items():
            for name in names:
                if type(getattr(state, name)) is not kind:
                    raise TypeError(f"{name} is {getattr(state, name)!r}")
        for name in ("loss_scale", "schedules", "figures"):
            if any(type(value) not in (int, float) for value in getattr(state, name).values()):
                raise TypeError(f"{name} is {getattr(state, name)!r}")
        if state.step < 0 or tag_of(state.step) != folder.name:
            raise ValueError(f"it is of step {state.step}")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(folder / STATE) from None
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder / STATE} cannot be read: {_line(error)}; take another checkpoint of this run"
        ) from None
    return state


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError."""
    try:
        values, files = read_sealed(folder / MANIFEST, ("files", "shapes"))
        shapes = {name: tuple(shape) for name, shape in values["shapes"].items()}
        for name, shape in shapes.items():
            if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) > sys.maxsize:
                raise ValueError(f"{name!r} cannot be of shape {shape}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / MANIFEST} cannot be read: {_line(error)}; take another checkpoint of this run"
        ) from None
    return Manifest(files, shapes)


def verify(folder: Path, names: list[str], manifest: Manifest) -> None:
    """Check that those files are as they were written. Raises UserError, naming the first that is not."""
    if changed := first_changed(folder, {name: manifest.files[name] for name in names}):
        raise UserError(
            f"the checkpoint {folder} is damaged: {': '.join(changed)}; remove this folder, and --resume takes the one "
            "before it"
        )


def rank_files(folder: Path, manifest: Manifest) -> list[Path]:
    return [folder / name for name in sorted(manifest.files) if name.startswith("rank_")]


def trained_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read all trained parameters, fp32, on the CPU, as the engine's module names them. Raises UserError."""
    from sacl_ds.training.tensor_files import Fragments

    return Fragments(rank_files(folder, manifest)).whole("weight", manifest.shapes)


def frozen_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read parameters that are not trained, and buffers; {} where there are none. Raises UserError."""
    return read_tensors(folder / FROZEN) if FROZEN in manifest.files else {}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises UserError."""
    return saved.read_tensors(file, f"the checkpoint {file.parent}")


def complete(checkpoints: Path) -> list[Path]:
    """List the complete checkpoints, the oldest first."""
    found = [(int(m[1]), path) for path in checkpoints.glob("step_*") if (m := _TAG.fullmatch(path.name))]
    named = [path for step, path in sorted(found) if path.name == tag_of(step)]
    return [path for path in named if (path / MANIFEST).exists() and (path / STATE).exists()]


def incomplete(checkpoints: Path, taken: int) -> list[str]:
    """Return a line for each checkpoint after step `taken` that was not taken since it lacks a file."""
    lines = []
    for path in sorted(checkpoints.glob("step_*")):
        missing = [name for name in (STATE, MANIFEST) if not (path / name).exists()]
        if missing and _TAG.fullmatch(path.name) and step_of(path) > taken:
            lines.append(f"the checkpoint {path} has no {missing[0]} and is passed over for {tag_of(taken)} before it")
    return lines


def latest(run_folder: Path) -> RunState | None:
    """Return the state of the checkpoint that --resume takes, or None.

    That is the one that `latest` names. Where that was removed by hand, or a kill came before it was ever written: the
    newest that is there.
    """
    checkpoints = run_folder / FOLDER
    try:
        named = checkpoints / (checkpoints / LATEST).read_text().strip()
        if _TAG.fullmatch(named.name) and named.parent == checkpoints:
            return read_state(named)
    except (OSError, UnicodeDecodeError):
        pass
    there = complete(checkpoints)
    return read_state(there[-1]) if there else None


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, renamed first: a folder that bears its name is always complete."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removing")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # what is left of it the next `sweep` removes


def sweep(checkpoints: Path) -> None:
    """Remove what a process that was killed while saving or removing left behind."""
    for left in [*checkpoints.glob(".*.writing"), *checkpoints.glob(".*.removing")]:
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def figures_of(named: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return an evaluation's metrics without their chance levels."""
    return {name: float(value) for name, (value, _) in named.items()}


def state_json(state: RunState) -> str:
    return json.dumps(asdict(state), indent=2)


def _line(error: BaseException) -> Any:
    return " ".join(str(error).split())[:200] or type(error).__name__


_PREFIX = "model."  # the objective's name for the model


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], RunState]:
    """Read RUN/checkpoints/step_N: the model's state in fp32 on the CPU, as `SaclModel` names it, and the run's state.

    Raises UserError where the folder holds no complete checkpoint, or a damaged one. No pickle is read.
    """
    try:
        state = read_state(folder)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no complete checkpoint (no {STATE}); give RUN/checkpoints/step_N, or a finished run"
        ) from None
    manifest = read_manifest(folder)
    verify(folder, sorted(manifest.files), manifest)
    weights = trained_weights(folder, manifest) | frozen_tensors(folder, manifest)
    return {
        name.removeprefix(_PREFIX): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if name.startswith(_PREFIX)
    }, state
