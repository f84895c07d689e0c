"""Build a run's data from its configuration: source, global order, collator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import TrainingView, View
from sacl_ds.data.collate import Collator
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.sample import Source
from sacl_ds.data.scenes import Scenes, SceneSource
from sacl_ds.data.text import Tokenizer
from sacl_ds.data.transforms import CanonicalView, TrainView

if TYPE_CHECKING:  # runs on scenes load nothing that reads shards
    from sacl_ds.data.shards.index import ShardIndex

Done = Callable[[int, int], None]  # (shards counted, all of them)
MISSING = "missing_shards.txt"  # in the run directory
HELD_OUT = 1000  # added to the seed of the training scenes


def training_index(
    run: RunConfig, folder: Path, resume: bool, done: Done = lambda count, total: None
) -> ShardIndex | None:
    """Count the shards that the run trains on; None for scenes.

    folder: the run's, which keeps the names of those that were left out; a resumed run leaves out the same. One process
    does this for all: what it finds is part of the data order.
    """
    if run.data.source != "shards":
        return None
    assert run.data.shards is not None
    from sacl_ds.data.shards.index import index_shards

    kept = folder / MISSING
    index = index_shards(
        run.data.shards,
        several=run.data.weights is not None,
        allow_missing=run.data.allow_missing,
        left_out=(kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []) if resume else None,
        done=done,
    )
    if index.missing and not resume:
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text("".join(f"{shard}\n" for shard in index.missing), encoding="utf-8")
    elif not resume:
        kept.unlink(missing_ok=True)
    return index


def training_source(run: RunConfig, index: ShardIndex | None) -> Source:
    """Open the run's training source. index: from `training_index`."""
    if index is not None:
        from sacl_ds.data.shards.source import ShardSource

        return ShardSource(index, run.data)
    scenes = run.data.scenes
    return SceneSource(Scenes(scenes.count, scenes.seed, scene_size(run.model.image_size), scenes.detail))


@dataclass(frozen=True)
class TrainingData:
    """Source, order and collator of a run. fingerprint: equal for two runs to which the same steps bring the same
    samples."""

    source: Source
    order: GlobalOrder
    collator: Collator
    canonical: View  # as evaluation sees samples
    fingerprint: str


def training_data(
    run: RunConfig, index: ShardIndex | None, tokenizer: Tokenizer, teacher: tuple[View, str] | None, first: bool
) -> TrainingData:
    """Build all that pre-training reads.

    teacher: how it sees a sample, and its identity, by which stored features are found.

    first: whether to look for all files of stored features, which one process does for all. Raises UserError where some
    are missing or of another teacher, or the grouping cannot be read.
    """
    data, source = run.data, training_source(run, index)
    features = None
    if teacher and run.teacher.features:
        from sacl_ds.data.teacher_features import FeatureFolder, FeatureReader

        assert index is not None
        folder = FeatureFolder(run.teacher.features, teacher[1])
        if first:
            folder.require_all(index.shards)
        features = FeatureReader(folder, index.shards)
    grouping = None
    if data.grouping:
        from sacl_ds.data.grouping import Grouping

        grouping = Grouping.load(Path(data.grouping))
    collator = Collator(
        TrainingView(_training_view(run), tokenizer),
        run.seed,
        run.loss.mlm_probability if run.loss.mlm_weight else None,
        teacher[0] if teacher and not features else None,
        features,
        data.duplicates,
        grouping,
    )
    batch = run.train.global_batch_size
    order = GlobalOrder(source.sets, batch, run.seed, data.streams, data.shuffle_buffer, source.weights)
    canonical = View(CanonicalView(run.model.image_size), tokenizer)
    return TrainingData(source, order, collator, canonical, _fingerprint(order, index))


def _training_view(run: RunConfig) -> CanonicalView | TrainView:
    if run.data.crops or run.data.flip:
        return TrainView(run.model.image_size, run.data.crop_scale if run.data.crops else (1.0, 1.0), run.data.flip)
    return CanonicalView(run.model.image_size)


def _fingerprint(order: GlobalOrder, index: ShardIndex | None) -> str:
    """Hash the order and the shards' names, whose folder may change."""
    names = [shard.rpartition("/")[2] for shard in index.shards] if index else []
    return hashlib.sha256(json.dumps([order.fingerprint, *names]).encode()).hexdigest()


def held_out_scenes(run: RunConfig) -> Scenes:
    """Return scenes that no training run of this seed sees, with partial captions."""
    return Scenes(run.data.scenes.eval_count, run.data.scenes.seed + HELD_OUT, scene_size(run.model.image_size))


def scene_size(image_size: int) -> int:
    """Return the size at which scenes are drawn, a multiple of 48 (3x3 cells of 16 pixels); transforms resize them."""
    return -(-image_size // 48) * 48
