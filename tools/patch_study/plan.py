"""Plan of the study of patch selection: arms, each a task with a way of choosing patches, over seeds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from weight_study.plan import read_validated

from sacl_ds.config import ModelConfig, PatchSelectionConfig
from sacl_ds.config.room import Room
from sacl_ds.data.scenes import VERSION
from sacl_ds.errors import UserError

TaskName = Literal["vqa", "pretrain"]


class PatchArm(Room):
    task: TaskName
    selection: PatchSelectionConfig = PatchSelectionConfig()


class Sizes(Room):
    """Settings that all arms share: a small model over scenes of 6 x 6 patches, four to a cell."""

    image_size: int = 48
    patch_size: int = 8
    width: int = 96
    heads: int = 4
    depth: int = 4
    text_layers: int = 2
    fusion_layers: int = 2
    scenes: int = Field(20_000, description="training scenes of a seed")
    held_out: int = 1000
    batch: int = 64
    image_scenes: int = 20_000
    image_steps: int = Field(1000, description="of the image encoder alone, to recognise what a cell shows")
    start_steps: dict[str, int] = Field(
        {"vqa": 2000, "pretrain": 1000}, description="of the whole model on a task with all patches: where arms start"
    )
    steps: dict[str, int] = Field({"vqa": 500, "pretrain": 200}, description="of an arm, from there")
    lr_image: float = 2e-4
    lr_text: float = 1e-3
    warmup: int = 50

    def model(self, selection: PatchSelectionConfig) -> ModelConfig:
        arguments = {
            "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads, "patch_size": self.patch_size
        }  # fmt: skip
        return ModelConfig.model_validate(
            {
                "image_encoder_arguments": arguments,
                "image_size": self.image_size,
                "text_width": self.width,
                "text_heads": self.heads,
                "text_layers": self.text_layers,
                "fusion_layers": self.fusion_layers,
                "patch_selection": selection.model_dump(),
            }
        )

    @property
    def image_fingerprint(self) -> str:
        """Digest that is equal for equal initial weights of the image encoder."""
        others = {"scenes", "held_out", "steps", "start_steps", "text_layers", "fusion_layers", "lr_image", "lr_text"}
        return _digest(self.model_dump(exclude=others))

    def start_fingerprint(self, task: str) -> str:
        """Digest that is equal for equal initial weights of a task."""
        return _digest({**self.model_dump(exclude={"steps", "start_steps"}), task: self.start_steps[task]})


class PatchPlan(Room):
    sizes: Sizes = Sizes()
    seeds: list[int] = Field([0, 1, 2])
    arms: dict[str, PatchArm]

    def only(self, arms: list[str] | None, seeds: list[int] | None) -> PatchPlan:
        """Return the plan restricted to these arms and seeds. Raises UserError for unknown ones."""
        for name in arms or []:
            if name not in self.arms:
                raise UserError(f"no arm of the plan is called {name!r}; it has {', '.join(self.arms)}")
        kept = {name: arm for name, arm in self.arms.items() if arms is None or name in arms}
        return PatchPlan(sizes=self.sizes, seeds=self.seeds if seeds is None else seeds, arms=kept)

    def fingerprint(self, name: str, seed: int) -> str:
        """Digest that is equal for two trials that train the same model."""
        arm = self.arms[name].model_dump(mode="json")
        task = self.arms[name].task
        start = self.sizes.start_fingerprint(task)
        return _digest({"arm": arm, "start": start, "steps": self.sizes.steps[task], "seed": seed})


def read_plan(path: Path) -> PatchPlan:
    """Raises UserError with one line."""
    return read_validated(path, PatchPlan)


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([VERSION, told], sort_keys=True).encode()).hexdigest()[:16]
