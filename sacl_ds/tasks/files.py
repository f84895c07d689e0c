"""Resolution of the paths and splits in a task's configuration."""

from __future__ import annotations

from pathlib import Path

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.sources import HELD_OUT, scene_size
from sacl_ds.errors import UserError

_SEEDS = {"train": 0, "val": HELD_OUT, "test": 2 * HELD_OUT}


def scenes_of(run: FinetuneConfig, split: str) -> Scenes:
    """Return the scenes of a split: those of val are the ones that a pre-training run of this seed holds out."""
    scenes = run.data.scenes
    count = scenes.count if split == "train" else scenes.eval_count
    return Scenes(count, scenes.seed + _SEEDS[split], scene_size(run.model.image_size), scenes.detail)


def images_folder(run: FinetuneConfig, folder: str | None = None, key: str = "data.images") -> Path:
    """Return data.images, or `folder` of the setting `key`. Raises UserError where it is not given, or no folder."""
    named = folder if folder is not None else run.data.images
    if named is None:
        raise UserError("data.images is missing: the folder of the images that the files name")
    path = Path(named)
    if not path.is_dir():
        raise UserError(f"{key if folder is not None else 'data.images'}={named}: no such folder; correct the path")
    return path
