"""Initial weights of the image encoder: trained to predict, at every patch, its cell's content and the object count.

It stands for the published image encoder that a real run starts from. All arms and seeds share it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from weight_study.cache import keep_array, keep_tensors, kept_array
from weight_study.model import CELLS, CLASSES, truth_of_cells

from patch_study.plan import Sizes
from sacl_ds.config import OptimConfig, PatchSelectionConfig
from sacl_ds.data.scene_language import MAX_OBJECTS
from sacl_ds.data.scenes import GRID, VERSION, Scenes
from sacl_ds.model.sacl import SaclModel
from sacl_ds.training.schedules import learning_rate_factor

_SEED = 77
_VOCABULARY = 10  # the text half is thrown away


def cells_of_patches(sizes: Sizes) -> Tensor:
    """Return (patches,) int64: the cell that each patch lies in, row by row."""
    side = sizes.image_size // sizes.patch_size
    along = torch.arange(side) * GRID // side
    return (along[:, None] * GRID + along).flatten()


def pictures(scenes: Scenes, folder: Path) -> Tensor:
    """Render (count, 3, H, W) uint8, or read them from `folder`, where they are kept."""
    path = folder / f"scenes-{VERSION}-{scenes.seed}-{len(scenes)}-{scenes.image_size}.npy"
    if not path.exists():
        keep_array(np.stack([scenes.image(index) for index in range(len(scenes))]), path)
    return torch.from_numpy(kept_array(path)).permute(0, 3, 1, 2).contiguous()


def image_start(sizes: Sizes, folder: Path) -> Path:
    """Load the image encoder's weights from `folder`, or train them (minutes on a core) and save them there."""
    path = folder / f"start-image-{sizes.image_fingerprint}.safetensors"
    if not path.exists():
        _train(sizes, folder, path)
    return path


def _train(sizes: Sizes, folder: Path, path: Path) -> None:
    scenes = Scenes(sizes.image_scenes, _SEED, sizes.image_size)
    images = pictures(scenes, folder)
    cell = cells_of_patches(sizes)
    truth = torch.from_numpy(truth_of_cells(scenes))[:, cell]
    truth = torch.cat([truth, cell[None, :, None].expand(len(truth), -1, 1)], 2)  # and where it lies
    objects = torch.tensor([len(scenes.scene(index).objects) for index in range(len(scenes))])
    torch.manual_seed(_SEED)
    encoder = SaclModel(sizes.model(PatchSelectionConfig()), _VOCABULARY, pretrained=False).image_encoder
    classes = [*CLASSES, CELLS]
    of_patches, of_image = nn.Linear(sizes.width, sum(classes)), nn.Linear(sizes.width, MAX_OBJECTS + 1)
    trained = [*encoder.parameters(), *of_patches.parameters(), *of_image.parameters()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    schedule = OptimConfig(warmup_steps=sizes.warmup)
    for step in range(sizes.image_steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * learning_rate_factor(step, sizes.image_steps, schedule)
        drawn = torch.randint(len(scenes), (sizes.batch,))
        tokens = encoder(images[drawn]).tokens
        told = of_patches(tokens[:, 1:]).split(classes, 2)
        losses = [
            nn.functional.cross_entropy(logits.flatten(0, 1), truth[drawn, :, which].flatten())
            for which, logits in enumerate(told)
        ]
        losses.append(nn.functional.cross_entropy(of_image(tokens[:, 0]), objects[drawn]))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    keep_tensors(encoder.state_dict(), path)
