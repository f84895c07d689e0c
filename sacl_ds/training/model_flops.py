"""FLOPs of a run's model, by its configuration."""

from __future__ import annotations

from sacl_ds.config import RunConfig
from sacl_ds.errors import UserError
from sacl_ds.model.cost import ModelCost
from sacl_ds.telemetry.throughput import RowFlops

_SPECIAL = 2  # [CLS] and [SEP], which MLM never predicts


def pair_flops(run: RunConfig, vocab_size: int) -> RowFlops | None:
    """Return FLOPs of forward and backward a pair, by its caption's length; None if the image encoder's are unknown."""

    try:
        cost = ModelCost(run.model, vocab_size=vocab_size)
    except UserError:
        return None

    def flops(tokens: int) -> float:
        predicted = run.loss.mlm_probability * (tokens - _SPECIAL)
        return cost.with_texts(tokens, predicted).pretraining(run.losses).training_flops

    return RowFlops.through(flops)
