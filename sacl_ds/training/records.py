"""A step's record: what the negatives of its global batch weighed, and the pairs that weighed least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sacl_ds.config import RecordsConfig
from sacl_ds.data.batch import Batch, duplicates
from sacl_ds.distributed import gather_objects, gather_rows, rank, row_counts
from sacl_ds.losses import Regulation
from sacl_ds.losses.weighing import Weighed, quantiles, weigh
from sacl_ds.telemetry.weight_records import DIRECTIONS, QUANTILES

_INFORMATION = ("pmi_positive", "pmi_negative", "pmi_negative_target", "infonce_bound")


def is_recorded(done: int, steps: int, records: RecordsConfig) -> bool:
    """Whether the step after which `done` are done is recorded: the first of `steps`, every so many, the last."""
    return bool(records.every) and (done in (1, steps) or done % (records.every or 1) == 0)


@dataclass(frozen=True)
class StepWeights:
    """What a step's ITC compared: (b, d) unit features of this rank's images and texts, (b, d_t) of the teacher."""

    features: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor] | None
    regulation: Regulation
    losses: dict[str, Tensor]

    def record(self, batch: Batch, lowest: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of figures and of lowest pairs, as `sacl_ds.telemetry.weight_records` has them; every rank calls it.

        The figures are the same on all ranks.
        """
        both = weigh(
            *self.features,
            self.losses["logit_scale"],
            teacher=self.teacher,
            pair_ids=batch.pair_ids,
            regulation=self.regulation,
            lowest=lowest,
        )
        ids = gather_rows(batch.pair_ids, row_counts(batch.pair_ids))
        figures = self._step_figures() | {"duplicates": duplicates(ids)}
        named = _named(both, batch)
        return (
            [{**figures, **_figures(direction, one)} for direction, one in zip(DIRECTIONS, both, strict=True)],
            [row for direction, one in zip(DIRECTIONS, both, strict=True) for row in _lowest(direction, one, named)],
        )

    def _step_figures(self) -> dict[str, float]:
        regulation, losses = self.regulation, self.losses
        return {
            "alpha": regulation.alpha,
            "sharpness": regulation.sharpness,
            "teacher_sharpness": regulation.teacher_sharpness,
            "logit_scale": float(losses["logit_scale"]),
            **{name: float(losses[name]) if name in losses else math.nan for name in _INFORMATION},
        }


def _figures(direction: str, one: Weighed) -> dict[str, Any]:
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


def _lowest(direction: str, one: Weighed, named: dict[int, tuple[str, str, str]]) -> list[dict[str, Any]]:
    low = one.lowest
    rows: list[dict[str, Any]] = []
    if low is None:
        return rows
    for place in range(len(low)):
        row: dict[str, Any] = {"direction": direction, "place": place}
        for role, position in (("anchor", low.anchor[place]), ("negative", low.negative[place])):
            values = named[int(position)]
            row |= {f"{role}_{what}": value for what, value in zip(("key", "shard", "caption"), values, strict=True)}
        row["weight"] = float(low.weight[place])
        row |= {"student_similarity": float(low.student[place]), "teacher_similarity": float(low.teacher[place])}
        rows.append(row)
    return rows


def _named(both: tuple[Weighed, Weighed], batch: Batch) -> dict[int, tuple[str, str, str]]:
    """Key, shard and caption of the pairs among the lowest, by position in the global batch; only those travel."""
    wanted = {int(at) for one in both if one.lowest for ends in (one.lowest.anchor, one.lowest.negative) for at in ends}
    start = sum(row_counts(batch.pair_ids)[: rank()])
    mine = {
        start + i: (batch.keys[i], batch.shards[i], batch.captions[i]) for i in range(len(batch)) if start + i in wanted
    }
    return {at: names for part in gather_objects(mine) for at, names in part.items()}
