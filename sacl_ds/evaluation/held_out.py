"""Held-out retrieval of a pre-training run, from its configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sacl_ds.config import CaptionFilter, RunConfig
from sacl_ds.data.batch import View
from sacl_ds.data.sample import Source
from sacl_ds.data.scenes import SceneSource
from sacl_ds.data.sources import held_out_scenes
from sacl_ds.model.sacl import SaclModel

Evaluator = Callable[[SaclModel, View, torch.device], dict[str, tuple[float, float]]]


def held_out_evaluator(run: RunConfig) -> Evaluator | None:
    """Return the evaluator of a pre-training run's held-out pairs, or None where it has none.

    Scenes are evaluated with `binding_accuracy` as well; shards are those of data.eval_shards. The code that evaluates
    is loaded at the first evaluation.
    """
    scenes, true_of_both = None, None
    if run.data.source == "shards":
        if not run.data.eval_shards:
            return None
        source, count = _photographs(run)
    else:
        scenes = held_out_scenes(run)
        source, count, true_of_both = SceneSource(scenes), len(scenes), scenes.relevance() == 1
    batch_size = 256 if run.model.image_size <= 128 else 64

    def evaluate(model: SaclModel, view: View, device: torch.device) -> dict[str, tuple[float, float]]:
        from sacl_ds.evaluation.binding import binding_accuracy
        from sacl_ds.evaluation.retrieval import evaluate_retrieval
        from sacl_ds.evaluation.rounds import RetrievalSet

        data = RetrievalSet(source, count, true_of_both)
        figures = evaluate_retrieval(model, data, view, device, batch_size).figures
        if scenes is None:
            return figures
        return figures | {"binding_accuracy": (binding_accuracy(model, scenes, view, device), 0.5)}

    return evaluate


def _photographs(run: RunConfig) -> tuple[Source, int]:
    """Open data.eval_shards; returns them with the number of images that are evaluated."""
    from sacl_ds.data.shards.index import index_shards
    from sacl_ds.data.shards.source import ShardSource

    assert run.data.eval_shards is not None
    index = index_shards(run.data.eval_shards, "data.eval_shards")
    source = ShardSource(index, run.data.model_copy(update={"captions": CaptionFilter(), "weights": None}))
    return source, min(index.total, run.data.eval_count or index.total)
