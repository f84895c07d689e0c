"""compare: the pairs of anchor and negative on whose weights two runs disagree most."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import parquet

from sacl_ds.analysis.inputs import batch_of, described, device_named, labels, progress, say, table
from sacl_ds.analysis.pairs import Pairs, mini_batch
from sacl_ds.analysis.ranking import spearman
from sacl_ds.analysis.report import plots
from sacl_ds.analysis.report.page import clean, plain, shown
from sacl_ds.analysis.subject import data_source, load_subject, read_pairs, regulation_of, source_count
from sacl_ds.config import RunConfig
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.losses.distribution import EDGES
from sacl_ds.telemetry.records import DIRECTIONS

TEACHER = "teacher"  # in the place of the second run
LIGHTEST = 1e-4
"""Weights under this count as this, so that the ratio to a removed negative is finite."""
_PRINTED = 10
_COLUMNS = ("direction", "log_ratio", "weight_a", "weight_b", "similarity_a", "similarity_b", "mini_batch")
_SIDES = ("key", "shard", "caption")


@dataclass
class Disagreement:
    """Over all mini-batches so far. Correlations are Spearman's; NaN where a side's weights are all the same.

    correlation: of the weights of all pairs of a mini-batch and direction, the mean over these. within_anchors: of the
    weights of one anchor's negatives, the mean over anchors. histogram: (bins, bins) int64, A's weight along the rows,
    bins of EDGES. mean_log_ratio: of |log(w_a / w_b)|.
    """

    top: int
    pairs: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros((len(EDGES) - 1, len(EDGES) - 1), np.int64))
    largest: list[dict[str, Any]] = field(default_factory=list)
    _log_ratios: float = 0.0
    _pooled: list[float] = field(default_factory=list)
    _by_anchor: list[float] = field(default_factory=list)

    @property
    def mean_log_ratio(self) -> float:
        return self._log_ratios / self.pairs if self.pairs else float("nan")

    @property
    def correlation(self) -> float:
        return _mean(self._pooled)

    @property
    def within_anchors(self) -> float:
        return _mean(self._by_anchor)

    def add(self, sides: tuple[Pairs, Pairs], regulations: tuple[Regulation, Regulation], number: int) -> None:
        """Add a mini-batch of the same pairs under both models."""
        a, b = (mini_batch(pairs, regulation) for pairs, regulation in zip(sides, regulations, strict=True))
        rows, columns = np.nonzero(a.negatives & b.negatives)
        for direction in DIRECTIONS:
            whole = a.weights(direction), b.weights(direction)
            first, second = (weights[rows, columns] for weights in whole)
            ratio = np.log(np.maximum(first, LIGHTEST)) - np.log(np.maximum(second, LIGHTEST))
            self.pairs += len(rows)
            self._log_ratios += float(np.abs(ratio).sum())
            self.histogram += _joint(first, second)
            if len(rows):
                self._pooled.append(spearman(first, second))
            for row in range(len(a.negatives)):
                of_row = np.flatnonzero(a.negatives[row] & b.negatives[row])
                if len(of_row) > 1:
                    self._by_anchor.append(spearman(whole[0][row, of_row], whole[1][row, of_row]))
            for at in np.argsort(-np.abs(ratio), kind="stable")[: self.top]:
                anchor, negative = int(rows[at]), int(columns[at])
                image, text = (anchor, negative) if direction == "image_to_text" else (negative, anchor)
                values = (direction, float(ratio[at]), float(first[at]), float(second[at]),
                          float(a.student[image, text]), float(b.student[image, text]), number)  # fmt: skip
                entry: dict[str, Any] = dict(zip(_COLUMNS, values, strict=True))
                for side, index in (("anchor", anchor), ("negative", negative)):
                    entry |= {f"{side}_{name}": getattr(sides[0], f"{name}s")[index] for name in _SIDES}
                self.largest.append(entry)
        self.largest.sort(key=lambda each: -abs(each["log_ratio"]))
        del self.largest[self.top :]


def act(options: argparse.Namespace) -> None:
    """Run the subcommand `compare`. Raises UserError."""
    out = Path(options.out)
    for name, least in (("count", 2), ("top", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: at least {least}")
    sides, regulations, runs, names = _sides(options)
    size = min(options.batch_size or runs[0].train.global_batch_size, len(sides[0]))
    if size < 2:
        raise UserError(f"--batch-size {size}: at least two, of which one is a negative of the other")
    found = Disagreement(options.top)
    order = np.random.default_rng(options.seed).permutation(len(sides[0]))
    whole = len(order) // size
    with progress("mini-batches", whole, "mini-batches") as done:
        for number in range(whole):
            part = order[number * size : (number + 1) * size]
            found.add((sides[0].take(part), sides[1].take(part)), regulations, number)
            done(1)
    _write(out, found, names, regulations, whole, size)
    _print(found, names, regulations)
    say(f"{whole} mini-batches of {size} pairs; {out}/disagreement.json, disagreement.parquet, weights.png")


def _sides(
    options: argparse.Namespace,
) -> tuple[tuple[Pairs, Pairs], tuple[Regulation, Regulation], tuple[RunConfig, RunConfig], tuple[str, str]]:
    """Load the same pairs under both models, the regulation of each, and their labels."""
    device = device_named(options.device)
    a = load_subject(options.a, device=device)
    source = data_source(a.run, options.shards)
    count = min(options.count, source_count(source))
    with progress("pairs, A", count, "pairs") as done:
        first = read_pairs(a, source, count, batch_size=batch_of(a), progress=done)
    of_a = _settings(a.run, options.sharpness, first)
    if options.b == TEACHER:
        if first.teacher is None:
            raise UserError(f"{options.a} has no teacher; name another run in its place")
        kappa = options.sharpness if options.sharpness is not None else of_a.sharpness
        alone = (replace(of_a, alpha=0.0, sharpness=kappa), replace(of_a, alpha=1.0))
        teacher = replace(first, image=first.teacher[0], text=first.teacher[1])  # whose cosines are to be listed
        return (first, teacher), alone, (a.run, a.run), ("the model alone", "its teacher alone")
    b = load_subject(options.b, device=device)
    with progress("pairs, B", count, "pairs") as done:
        second = read_pairs(b, source, count, batch_size=batch_of(b), progress=done)
    if (first.keys, first.shards, first.captions) != (second.keys, second.shards, second.captions):
        raise UserError(
            f"{options.a} and {options.b} did not read the same pairs; the data have changed, or their filter"
        )
    regulations = of_a, _settings(b.run, options.sharpness, second)
    names = labels([options.a, options.b])
    return (first, second), regulations, (a.run, b.run), (names[0], names[1])


def _settings(run: RunConfig, sharpness: float | None, pairs: Pairs) -> Regulation:
    """Return the regulation at the end of the run, without a teacher if the pairs have none."""
    regulation = regulation_of(run, sharpness=sharpness)
    return regulation if pairs.teacher is not None else replace(regulation, alpha=0.0)


def _write(
    out: Path,
    found: Disagreement,
    names: tuple[str, str],
    regulations: tuple[Regulation, Regulation],
    batches: int,
    size: int,
) -> None:
    numbers = {
        "a": names[0],
        "b": names[1],
        "regulation_a": described(regulations[0]),
        "regulation_b": described(regulations[1]),
        "mini_batches": batches,
        "batch_size": size,
        "pairs": found.pairs,
        "rank_correlation": found.correlation,
        "rank_correlation_within_anchors": found.within_anchors,
        "mean_absolute_log_ratio": found.mean_log_ratio,
        "edges": EDGES[1:-1],  # JSON has no infinity: the first bin begins at 0, the last has no end
        "histogram": found.histogram,
        "largest": found.largest,
    }
    encodable = [{n: plain(v) for n, v in entry.items()} for entry in found.largest]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "disagreement.json").write_text(json.dumps(plain(numbers), ensure_ascii=False) + "\n", encoding="utf-8")
        parquet.write_table(arrow.Table.from_pylist(encodable, _schema()), out / "disagreement.parquet")
        plots.joint(
            out / "weights.png",
            np.array(EDGES),
            found.histogram,
            names,
            "Weights of the same pairs of anchor and negative",
        )
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None


def _schema() -> arrow.Schema:
    numbers = {"log_ratio", "weight_a", "weight_b", "similarity_a", "similarity_b"}
    columns: list[tuple[str, Any]] = [
        (name, arrow.float64() if name in numbers else arrow.int64() if name == "mini_batch" else arrow.string())
        for name in _COLUMNS
    ]
    columns += [(f"{side}_{name}", arrow.string()) for side in ("anchor", "negative") for name in _SIDES]
    return arrow.schema(columns)


def _print(found: Disagreement, names: tuple[str, str], regulations: tuple[Regulation, Regulation]) -> None:
    for letter, name, regulation in zip("AB", names, regulations, strict=True):
        even = "; all negatives weigh the same: --sharpness changes that" if regulation.even else ""
        settings = f"κ {regulation.sharpness:g}, κ_t {regulation.teacher_sharpness:g}, α {regulation.alpha:g}"
        say(f"{letter}  {name}: {settings}{even}")
    say(f"rank correlation of weights  {shown(found.correlation)}, within an anchor {shown(found.within_anchors)}")
    say(f"mean |log(A / B)|            {shown(found.mean_log_ratio)} over {shown(found.pairs)} pairs\n")
    rows: list[Sequence[str]] = []
    for entry in found.largest[:_PRINTED]:
        arrow_ = "image → text" if entry["direction"] == "image_to_text" else "text → image"
        captions = clean(entry["anchor_caption"], 60), clean(entry["negative_caption"], 60)
        rows.append([arrow_, *captions, shown(entry["weight_a"]), shown(entry["weight_b"])])
    table(["direction", "anchor", "negative", "A", "B"], rows, left=3)


def _joint(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    bins = len(EDGES) - 1
    row, column = (np.searchsorted(EDGES, values, side="right") - 1 for values in (first, second))
    return np.bincount(row * bins + column, minlength=bins * bins).reshape(bins, bins)


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
