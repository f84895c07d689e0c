"""Plan of a study: arms and seeds, read from YAML, checked before anything starts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from sacl_ds.config.room import Fraction, NaturalFloat, Positive, PositiveFloat, Room
from sacl_ds.data.scenes import VERSION
from sacl_ds.errors import UserError
from sacl_ds.yaml_files import parse_yaml
from weight_study.model import Shape, StemSettings

_Kind = TypeVar("_Kind", bound=BaseModel)

Weights = Literal[
    "even", "sacl", "mass_only", "shape_only", "shuffled", "removed_share", "hard",
    "matches", "relevance", "relevance_shape",
]  # fmt: skip
Family = Literal["infonce", "control", "regulated", "other", "oracle", "teacher"]
AVERAGE = "average"  # in the place of a teacher's name: the student's own average


class Calibration(Room):
    """Calibration of kappa_t: `share` of the negatives weigh less than `under` (the paper: 0.2, 0.7)."""

    share: Fraction
    under: PositiveFloat


class Arm(Room):
    """Weighting of the negatives in one arm. Fields that a kind of weights does not use have no effect."""

    family: Family = Field(description="what the summary takes it for")
    weights: Weights = Field(
        "even",
        description="even: all alike; sacl: the regulation; mass_only, shape_only: its push alone, its distribution "
        "alone; shuffled: its weights dealt out at random among an anchor's negatives; removed_share: the `share` of "
        "lowest weight removed; hard: Robinson et al. 2021 and, at beta 0, Chuang et al. 2020; matches: true false "
        "negatives removed; relevance, relevance_shape: 1 - true relevance, with its push or InfoNCE's",
    )
    mass: PositiveFloat = Field(1.0, description="mean weight of the negatives")
    sharpness: NaturalFloat = Field(0.0, description="kappa")
    teacher: str | None = Field(None, description=f"the arm that teaches, or {AVERAGE!r}: the student's average")
    teacher_sharpness: NaturalFloat | Calibration = Field(0.0, description="kappa_t, or how to find it")
    alpha_start: Fraction = 1.0
    alpha_end: Fraction = 1.0
    hand_over: PositiveFloat = Field(0.5, description="share of the steps after which alpha_end is reached")
    fall: Fraction | None = Field(
        None, description="share of all pairs above whose teacher similarity weights fall; sets alpha, see `calibrate`"
    )
    drop_below: PositiveFloat | None = Field(None, description="negatives of less weight are removed, the rest weigh 1")
    share: Fraction = Field(0.0, description="of removed_share")
    beta: NaturalFloat = Field(0.0, description="of hard: concentration on hard negatives")
    positives: Fraction = Field(0.0, description="of hard: assumed share of false negatives (their tau+)")
    average_decay: Fraction = Field(0.99, description="of the student's average, a step")
    scale: PositiveFloat | None = Field(None, description="fixed logit scale; null: learned")
    captions: Literal["partial", "simple", "detailed"] = "partial"
    steps: Positive | None = Field(None, description="null: the plan's")

    @model_validator(mode="after")
    def _check(self) -> Arm:
        if self.fall is not None and (self.sharpness or self.teacher in (None, AVERAGE)):
            raise ValueError("fall needs a teacher arm and sharpness 0")
        if isinstance(self.teacher_sharpness, Calibration) and self.teacher in (None, AVERAGE):
            raise ValueError("a calibrated teacher_sharpness needs a teacher arm")
        return self


class Common(Room):
    """Settings that all arms share."""

    scenes: Positive = Field(20_000, description="training scenes of a seed")
    eval_scenes: Positive = 1000
    eval_captions: Positive = Field(2, description="of each held-out scene")
    steps: Positive = 1000
    batch: Positive = 128
    learning_rate: PositiveFloat = 1e-3
    warmup: Positive = 100
    weight_decay: NaturalFloat = 0.01
    width: Positive = 96
    layers: Positive = 1
    stem_steps: Positive = Field(1500, description="training of the frozen image stem")

    @property
    def shape(self) -> Shape:
        return Shape(self.width, self.layers, self.layers, 4, self.width)

    @property
    def stem(self) -> StemSettings:
        return StemSettings(steps=self.stem_steps)


class Plan(Room):
    common: Common = Common()
    seeds: list[int] = Field([0, 1, 2])
    arms: dict[str, Arm]
    sweeps: dict[str, dict[str, float]] = Field(
        {}, description="curves of the summary: {title: {arm: value on the horizontal axis}}"
    )

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if AVERAGE in self.arms:
            raise ValueError(f"{AVERAGE!r} stands for the student's average as a teacher; give the arm another name")
        for name, arm in self.arms.items():
            self.chain(name)
            if arm.teacher not in (None, AVERAGE) and arm.teacher not in self.arms:
                raise ValueError(f"arm {name}: no arm is called {arm.teacher!r}")
        for title, points in self.sweeps.items():
            if unknown := [name for name in points if name not in self.arms]:
                raise ValueError(f"sweep {title!r}: no arm is called {unknown[0]!r}")
        return self

    def chain(self, name: str) -> list[str]:
        """List the arm's teacher, its teacher's teacher and so on. Raises ValueError for a circle."""
        found: list[str] = []
        teacher = self.arms[name].teacher
        while teacher is not None and teacher in self.arms:
            if teacher in (name, *found):
                raise ValueError(f"arm {name}: its teachers {', '.join([*found, teacher])} go round in a circle")
            found.append(teacher)
            teacher = self.arms[teacher].teacher
        return found

    def ordered(self) -> list[str]:
        """Sort the arms in the plan's order, each after its teachers."""
        order: list[str] = []
        for name in self.arms:
            order += [each for each in [*reversed(self.chain(name)), name] if each not in order]
        return order

    def only(self, arms: list[str] | None, seeds: list[int] | None) -> Plan:
        """Return the plan restricted to these arms, their teachers and these seeds. Raises UserError for unknown."""
        for name in arms or []:
            if name not in self.arms:
                raise UserError(f"no arm of the plan is called {name!r}; it has {', '.join(self.arms)}")
        for seed in seeds or []:
            if seed not in self.seeds:
                raise UserError(f"seed {seed} is none of the plan's: {', '.join(map(str, self.seeds))}")
        wanted = set(self.arms) if arms is None else {each for arm in arms for each in (arm, *self.chain(arm))}
        kept = {name: arm for name, arm in self.arms.items() if name in wanted}
        sweeps = {
            title: {name: value for name, value in points.items() if name in wanted}
            for title, points in self.sweeps.items()
        }
        return Plan(common=self.common, seeds=self.seeds if seeds is None else seeds, arms=kept, sweeps=sweeps)

    def fingerprint(self, name: str, seed: int) -> str:
        """Digest that is equal for two trials that train the same model, whatever their arms are called."""
        arm = self.arms[name]
        settings: dict[str, Any] = arm.model_dump(mode="json", exclude={"family", "teacher"}, exclude_none=True)
        teacher = arm.teacher
        settings["taught_by"] = self.fingerprint(teacher, seed) if teacher in self.arms else teacher
        told = json.dumps([VERSION, self.common.model_dump(mode="json"), settings, seed], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_plan(path: Path) -> Plan:
    """Raises UserError with one line."""
    return read_validated(path, Plan)


def read_validated(path: Path, kind: type[_Kind]) -> _Kind:
    """Read a plan of any study from its YAML. Raises UserError with one line."""
    try:
        return kind.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {where}: {said}" if where else f"{path}: {said}") from None
