"""Image stem of the study: a small network that has learned what one cell of a scene shows.

It stands for the published image encoder that a real run starts from (the paper: CLIP's ViT). It is trained once, on
scenes of its own, and frozen; all arms and seeds share it, so that arms differ in the contrastive loss alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sacl_ds.data.scene_language import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES
from sacl_ds.data.scene_rendering import GRID
from sacl_ds.data.scenes import VERSION, Scenes
from sacl_ds.study.cache import keep_tensors, kept_tensors

CELLS = GRID * GRID
_CELL = 16  # pixels
# shape, colour, size and texture of the object (the last class: none), and the background
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, len(TEXTURES) + 1, len(BACKGROUNDS))


@dataclass(frozen=True)
class StemSettings:
    width: int = 64
    hidden: int = 256
    scenes: int = 6000
    steps: int = 1500
    batch: int = 1024  # cells
    learning_rate: float = 2e-3
    seed: int = 77

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((VERSION, self)).encode()).hexdigest()[:12]


class Stem(nn.Module):
    """Encoder of cells: (n, CELLS, 3, 16, 16) float pixels in [-1, 1] -> (n, CELLS, width)."""

    def __init__(self, settings: StemSettings) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(-3),
            nn.Linear(3 * _CELL * _CELL, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.width),
        )
        self.heads = nn.ModuleList(nn.Linear(settings.width, classes) for classes in CLASSES)

    def forward(self, cells: Tensor) -> Tensor:
        states = self.body(cells)
        return nn.functional.layer_norm(states, states.shape[-1:])


def cells_of(images: np.ndarray) -> Tensor:
    """Cut images into cells: (n, 48, 48, 3) uint8 -> (n, CELLS, 3, 16, 16) float32 in [-1, 1], row by row."""
    n = len(images)
    pixels = torch.from_numpy(images).float().div_(127.5).sub_(1)
    return pixels.view(n, GRID, _CELL, GRID, _CELL, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, CELLS, 3, _CELL, _CELL)


def trained_stem(settings: StemSettings, folder: Path) -> Stem:
    """Load the stem from `folder`, or train it (under a minute on a core) and save it there."""
    path = folder / f"stem-{settings.fingerprint}.safetensors"
    stem = Stem(settings)
    if path.exists():
        stem.load_state_dict(kept_tensors(path))
        return stem.eval().requires_grad_(False)
    scenes = Scenes(settings.scenes, settings.seed)
    cells = cells_of(np.stack([scenes.image(i) for i in range(len(scenes))])).flatten(0, 1)
    truth = torch.from_numpy(truth_of_cells(scenes)).flatten(0, 1)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        stem = Stem(settings)
    optimizer = torch.optim.AdamW(stem.parameters(), settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps)
    for _ in range(settings.steps):
        rows = torch.randint(len(cells), (settings.batch,), generator=generator)
        states = stem(cells[rows])
        loss = sum(
            (nn.functional.cross_entropy(head(states), truth[rows, which]) for which, head in enumerate(stem.heads)),
            torch.zeros(()),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    keep_tensors(stem.state_dict(), path)
    return stem.eval().requires_grad_(False)


@torch.no_grad()
def stem_accuracy(stem: Stem, scenes: Scenes) -> list[float]:
    """Return the share of cells whose shape, colour, size, texture and background are all predicted right."""
    cells = cells_of(np.stack([scenes.image(i) for i in range(len(scenes))])).flatten(0, 1)
    truth, states = torch.from_numpy(truth_of_cells(scenes)).flatten(0, 1), stem(cells)
    return [float((head(states).argmax(1) == truth[:, which]).float().mean()) for which, head in enumerate(stem.heads)]


def truth_of_cells(scenes: Scenes) -> np.ndarray:
    """Return the classes of the scenes' cells, (count, CELLS, len(CLASSES)) int64."""
    truth = np.empty((len(scenes), CELLS, len(CLASSES)), np.int64)
    truth[:, :, :4] = np.array(CLASSES[:4]) - 1
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        truth[index, :, 4] = scene.background
        for *attributes, place in scene.objects:
            truth[index, place, :4] = attributes
    return truth
