"""From the configuration to a source of samples."""

from __future__ import annotations

import hashlib
import json

from sacl_ds.config import RunConfig
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.sample import Source
from sacl_ds.data.scene_source import SceneSource
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.shards.index import Done, ShardIndex, index_shards
from sacl_ds.data.shards.source import ShardSource

HELD_OUT = 1000  # added to the seed of the training scenes


def training_index(run: RunConfig, done: Done = lambda count, total: None) -> ShardIndex | None:
    """The shards that the run trains on, counted; None for scenes. Raises UserError for missing or empty ones.

    One process does this for all: what it finds is part of the data order.
    """
    if run.data.source != "shards":
        return None
    assert run.data.shards is not None
    return index_shards(run.data.shards, several=run.data.weights is not None, done=done)


def training_source(run: RunConfig, index: ShardIndex | None) -> Source:
    """What the run trains on; index: from `training_index`."""
    if index is not None:
        return ShardSource(index, run.data)
    scenes = run.data.scenes
    return SceneSource(Scenes(scenes.count, scenes.seed, scene_size(run.model.image_size), scenes.detail))


def global_order(run: RunConfig, source: Source) -> GlobalOrder:
    data = run.data
    batch = run.train.global_batch_size
    return GlobalOrder(source.sets, batch, run.seed, data.streams, data.shuffle_buffer, source.weights)


def data_fingerprint(order: GlobalOrder, index: ShardIndex | None) -> str:
    """Equal for two runs to which the same steps bring the same samples. Shards may have moved to another folder."""
    names = [shard.rpartition("/")[2] for shard in index.shards] if index else []
    return hashlib.sha256(json.dumps([order.fingerprint, *names]).encode()).hexdigest()


def held_out_scenes(run: RunConfig) -> Scenes:
    """Scenes that no training run of this seed sees, with partial captions."""
    return Scenes(run.data.scenes.eval_count, run.data.scenes.seed + HELD_OUT, scene_size(run.model.image_size))


def scene_size(image_size: int) -> int:
    """Scenes are drawn on a grid of 3x3 cells of 16 pixels or a multiple; the view then resizes them."""
    return -(-image_size // 48) * 48
