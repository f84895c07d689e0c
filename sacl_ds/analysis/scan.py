"""The distribution of weights over many mini-batches of a data set, under one model or several side by side."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import torch
from pyarrow import parquet

from sacl_ds.analysis.inputs import described, examine, in_order, labels, per_cent, progress, regulation_for, say, table
from sacl_ds.analysis.pairs import Pairs
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.losses.distribution import EDGES, THRESHOLDS, Weighed, quantiles, weigh
from sacl_ds.telemetry.records import DIRECTIONS, QUANTILES

_MEANS = ("effective", "effective_share", "mass", "shape")


@dataclass
class Distribution:
    """The weights of one direction over mini-batches; fields as in `sacl_ds.losses.distribution.Weighed`."""

    anchors: int = 0
    pairs: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGES) - 1, np.int64))
    _under: np.ndarray = field(default_factory=lambda: np.zeros(len(THRESHOLDS), np.int64))
    _sums: np.ndarray = field(default_factory=lambda: np.zeros(len(_MEANS) + 1))
    _of: np.ndarray = field(default_factory=lambda: np.zeros(len(_MEANS) + 1))

    def add(self, weighed: Weighed) -> None:
        self.anchors += weighed.anchors
        self.pairs += weighed.pairs
        self.histogram += weighed.histogram
        if weighed.pairs:
            self._under += np.rint(weighed.under * weighed.pairs).astype(np.int64)
        values = np.array([getattr(weighed, name) for name in (*_MEANS, "mean_log_weight")])
        counts = np.where(np.isnan(values), 0.0, [weighed.anchors] * len(_MEANS) + [weighed.pairs])
        self._sums += np.nan_to_num(values) * counts
        self._of += counts

    @property
    def under(self) -> np.ndarray:
        """(9,) share of the weights under each of THRESHOLDS."""
        return self._under / self.pairs if self.pairs else np.full(len(THRESHOLDS), math.nan)

    def figures(self) -> dict[str, Any]:
        """Return all metrics, for JSON and parquet."""
        means = np.divide(self._sums, self._of, out=np.full(len(self._of), math.nan), where=self._of > 0)
        return {
            "anchors": self.anchors,
            "pairs": self.pairs,
            **dict(zip((*_MEANS, "mean_log_weight"), means.tolist(), strict=True)),
            "under": self.under.tolist(),
            "quantiles": quantiles(self.histogram, QUANTILES).tolist(),
            "histogram": self.histogram.tolist(),
        }


def mini_batches(pairs: int, batches: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of mini-batches: without replacement within an epoch, each in the order that `seed` draws for it.

    What does not fill a mini-batch at the end of an epoch is left out of it.
    """
    given = epoch = 0
    while given < batches:
        order = np.random.default_rng([seed, epoch]).permutation(pairs)
        for start in range(0, pairs - batch_size + 1, batch_size):
            if given == batches:
                return
            yield order[start : start + batch_size]
            given += 1
        epoch += 1


def scan(
    pairs: Pairs,
    regulation: Regulation,
    batches: int,
    batch_size: int,
    seed: int = 0,
    seen: Callable[[int], None] = lambda count: None,
) -> dict[str, Distribution]:
    """Compute the distribution of weights over mini-batches, by direction.

    batch_size is at most the number of pairs. seen(1) is called after each mini-batch.

    The sums are made in the order of the mini-batches, and so have the same bits each time.
    """
    found = {direction: Distribution() for direction in DIRECTIONS}
    drawn = mini_batches(len(pairs), batches, batch_size, seed)
    for both in in_order(lambda rows: _weighed(pairs, rows, regulation), drawn):
        for direction, weighed in zip(DIRECTIONS, both, strict=True):
            found[direction].add(weighed)
        seen(1)
    return found


def _weighed(pairs: Pairs, rows: np.ndarray, regulation: Regulation) -> tuple[Weighed, Weighed]:
    rows = np.sort(rows)  # the order within a mini-batch changes nothing, and a mapped file is read forwards
    image, text, ids = (torch.from_numpy(each[rows]) for each in (pairs.image, pairs.text, pairs.pair_ids))
    teacher = None
    if pairs.teacher is not None and regulation.teacher:
        teacher = torch.from_numpy(pairs.teacher[0][rows]), torch.from_numpy(pairs.teacher[1][rows])
    return weigh(image, text, pairs.logit_scale, teacher=teacher, pair_ids=ids, regulation=regulation)


def act(options: argparse.Namespace) -> None:
    """Run the subcommand `scan`."""
    if options.batches < 1 or options.batch_size < 2:
        raise UserError("--batches is at least 1, and --batch-size at least 2")
    if options.save_features and len(options.paths) > 1:
        raise UserError("--save-features takes one run at a time")
    subjects, drawn = [], []
    for path, label in zip(options.paths, labels(options.paths), strict=True):
        examined = examine(path, options)
        pairs, regulation = examined.pairs, regulation_for(examined, options)
        if len(pairs) < 2:
            raise UserError(f"{path}: {len(pairs)} pair has no negatives; give more data")
        size, batches = options.batch_size, options.batches
        if size >= len(pairs):
            size, batches = len(pairs), 1
            say(f"note: {path}: all {size} pairs are one mini-batch, fewer than --batch-size {options.batch_size}")
        with progress(f"scan {label}", batches, "mini-batches") as seen:
            found = scan(pairs, regulation, batches, size, options.seed, seen)
        subjects.append(
            {
                "path": path,
                "label": label,
                "step": examined.step,
                "samples": len(pairs),
                "skipped": pairs.skipped,
                "batches": batches,
                "batch_size": size,
                "seed": options.seed,
                "logit_scale": pairs.logit_scale,
                "regulation": described(regulation),
                "directions": {direction: each.figures() for direction, each in found.items()},
            }
        )
        drawn.append((label, {direction: each.histogram for direction, each in found.items()}))
    _print(subjects)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    # imported here: the plots take as long to import as all else
    from sacl_ds.analysis.plots import weight_histograms

    _write(subjects, out)
    weight_histograms(drawn, out / "scan.png")
    say(f"written: {out}/scan.json, scan.parquet, scan.png")


def _print(subjects: list[dict[str, Any]]) -> None:
    shown = (1, 2, 5, 7, 9)
    rows = []
    for subject in subjects:
        for direction, figures in subject["directions"].items():
            arrow_sign = "image→text" if direction == DIRECTIONS[0] else "text→image"
            middle = figures["quantiles"][QUANTILES.index(0.5)]
            rows.append(
                [
                    subject["label"],
                    arrow_sign,
                    *(per_cent(figures["under"][tenth - 1]) for tenth in shown),
                    f"{middle:.2f}",
                    per_cent(figures["effective_share"]),
                    f"{figures['mass']:+.2f}",
                    f"{figures['shape']:.3f}",
                ]
            )
    headings = ["", "anchors", *(f"% <.{tenth}" for tenth in shown), "median", "effective %", "mass", "shape"]
    for subject in subjects:
        r = subject["regulation"]
        say(
            f"{subject['label']}: {subject['samples']} pairs, {subject['batches']} mini-batches of "
            f"{subject['batch_size']}, α {r['alpha']:.3g}, κ {r['sharpness']:.3g}, κ_t {r['teacher_sharpness']:.3g}, "
            f"logit scale {subject['logit_scale']:.1f}"
        )
    table(headings, rows, left=2)


def _write(subjects: list[dict[str, Any]], out: Path) -> None:
    """Write scan.json and scan.parquet."""
    edges = [float(edge) if math.isfinite(edge) else None for edge in EDGES]  # JSON has no infinity
    whole = {
        "edges": edges,
        "thresholds": list(THRESHOLDS),
        "quantiles": list(QUANTILES),
        "subjects": _without_nan(subjects),
    }
    (out / "scan.json").write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n")
    rows = []
    for subject in subjects:
        common = {name: value for name, value in subject.items() if name not in ("directions", "regulation")}
        for direction, figures in subject["directions"].items():
            rows.append({**common, **subject["regulation"], "direction": direction, **figures})
    parquet.write_table(arrow.Table.from_pylist(rows), out / "scan.parquet")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
