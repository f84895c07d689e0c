"""Record of a step: its negatives' weights, and the pairs that weighed least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sacl_ds.data.batch import Batch, duplicates
from sacl_ds.distributed import gather_objects, gather_rows, rank, row_counts
from sacl_ds.losses import Regulation
from sacl_ds.losses.distribution import Lowest, Weighed, quantiles, weigh
from sacl_ds.telemetry.records import DIRECTIONS, QUANTILES

Row = dict[str, Any]
_INFORMATION = ("pmi_positive", "pmi_negative", "pmi_negative_target", "infonce_bound")


def step_record(
    features: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    regulation: Regulation,
    losses: Mapping[str, Tensor],
    batch: Batch,
    lowest: int,
) -> tuple[list[Row], list[Row]]:
    """Make a step's rows of figures and of the `lowest` pairs of least weight, for `sacl_ds.telemetry.records`.

    features, teacher: what the step's ITC compared, (b, d) unit features of this rank's images and texts, (b, d_t) of
    the teacher. losses: of the step, with `logit_scale` and the figures on mutual information. Every rank calls it; the
    figures are the same on all.
    """
    scale = float(losses["logit_scale"])
    both = weigh(*features, scale, teacher=teacher, pair_ids=batch.pair_ids, regulation=regulation, lowest=lowest)
    named = _named(both, batch)
    figures: Row = {
        "alpha": regulation.alpha,
        "sharpness": regulation.sharpness,
        "teacher_sharpness": regulation.teacher_sharpness,
        "logit_scale": scale,
        **{name: float(losses[name]) if name in losses else math.nan for name in _INFORMATION},
        "duplicates": duplicates(gather_rows(batch.pair_ids, row_counts(batch.pair_ids))),
    }
    of_directions = list(zip(DIRECTIONS, both, strict=True))
    return (
        [{**figures, **_figures(direction, one)} for direction, one in of_directions],
        [row for direction, one in of_directions for row in lowest_rows(direction, one.lowest, named)],
    )


def _figures(direction: str, one: Weighed) -> Row:
    return {
        "direction": direction,
        "anchors": one.anchors,
        "pairs": one.pairs,
        "histogram": one.histogram.tolist(),
        "quantiles": quantiles(one.histogram, QUANTILES).tolist(),
        "under": one.under.tolist(),
        "effective": one.effective,
        "effective_share": one.effective_share,
        "mass": one.mass,
        "shape": one.shape,
    }


def lowest_rows(direction: str, low: Lowest | None, named: Mapping[int, tuple[str, str, str]]) -> list[Row]:
    """Make rows of the pairs of least weight. named: key, shard and caption by position in the batch."""
    rows: list[Row] = []
    if low is None:
        return rows
    for place in range(len(low)):
        row: Row = {"direction": direction, "place": place}
        for role, position in (("anchor", low.anchor[place]), ("negative", low.negative[place])):
            values = named[int(position)]
            row |= {f"{role}_{what}": value for what, value in zip(("key", "shard", "caption"), values, strict=True)}
        row["weight"] = float(low.weight[place])
        row |= {"student_similarity": float(low.student[place]), "teacher_similarity": float(low.teacher[place])}
        rows.append(row)
    return rows


def _named(both: tuple[Weighed, Weighed], batch: Batch) -> dict[int, tuple[str, str, str]]:
    """Gather key, shard and caption of the lowest pairs, by position in the global batch; only those travel."""
    wanted = {int(at) for one in both if one.lowest for ends in (one.lowest.anchor, one.lowest.negative) for at in ends}
    start = sum(row_counts(batch.pair_ids)[: rank()])
    mine = {
        start + i: (batch.keys[i], batch.shards[i], batch.captions[i]) for i in range(len(batch)) if start + i in wanted
    }
    return {at: names for part in gather_objects(mine) for at, names in part.items()}
