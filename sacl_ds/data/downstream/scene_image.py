"""Scene in place of an image file."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sacl_ds.data.pictures import Picture
from sacl_ds.data.scenes import Scenes


@dataclass(frozen=True, slots=True)
class SceneImage:
    """Picture of a scene, drawn only when it is read."""

    scenes: Scenes
    index: int

    @property
    def key(self) -> str:
        return f"scene {self.scenes.key(self.index)}"

    def picture(self) -> Picture:
        return Picture(torch.from_numpy(self.scenes.image(self.index)).permute(2, 0, 1))
