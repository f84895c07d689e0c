"""From the configuration to a source of samples."""

from __future__ import annotations

from sacl_ds.config import RunConfig
from sacl_ds.data.sample import Source
from sacl_ds.data.scenes import Scenes, SceneSource
from sacl_ds.data.shards import ShardSource

HELD_OUT = 1000  # added to the seed of the training scenes


def training_source(run: RunConfig) -> Source:
    """What the run trains on. Raises UserError for missing or empty shards."""
    if run.data.source == "shards":
        assert run.data.shards is not None
        return ShardSource(run.data.shards)
    scenes = run.data.scenes
    return SceneSource(Scenes(scenes.count, scenes.seed, scene_size(run), scenes.detail))


def held_out_scenes(run: RunConfig) -> Scenes:
    """Scenes that no training run of this seed sees, with partial captions."""
    return Scenes(run.data.scenes.eval_count, run.data.scenes.seed + HELD_OUT, scene_size(run))


def scene_size(run: RunConfig) -> int:
    """Scenes are drawn on a grid of 3x3 cells of 16 pixels or a multiple; the view then resizes them."""
    return -(-run.model.image_size // 48) * 48
