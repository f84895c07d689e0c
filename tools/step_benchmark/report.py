"""Measurements as rows, a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sacl_ds.telemetry.throughput import flops_text
from step_benchmark.peers import EQUAL

BASE = "ITC, SACL"


@dataclass(frozen=True)
class Measured:
    """Measurements of one step.

    seconds: of each round. loss: those of the contrastive loss alone, in the same rounds; None for peers.

    flops: of a step on one device. bytes: at the peak.
    """

    seconds: list[float]
    flops: float | None
    loss: list[float] | None
    bytes: float | None


@dataclass(frozen=True)
class StepSummary:
    """Medians. of_peer, of_itc: time beside that of open_clip with our towers, and of our ITC step, in the same round:
    (median, least, most)."""

    step: str
    seconds: float
    pairs_per_second: float
    flops_per_second: float | None
    mfu: float | None
    bytes: float | None
    loss_share: float | None
    of_peer: tuple[float, float, float] | None
    of_itc: tuple[float, float, float] | None
    rounds: list[float]


def rows_of(measured: Mapping[str, Measured], pairs: int, peak: float | None) -> list[StepSummary]:
    """Summarise measurements as rows. pairs: of a step, over all ranks. peak: FLOP/s of a device."""
    rows = []
    for name, found in measured.items():
        seconds = statistics.median(found.seconds)
        rate = None if found.flops is None else found.flops / seconds
        rows.append(
            StepSummary(
                name,
                seconds,
                pairs / seconds,
                rate,
                rate / peak if rate and peak else None,
                found.bytes,
                statistics.median(found.loss) / seconds if found.loss else None,
                _ratios(found, measured.get(EQUAL)),
                _ratios(found, measured.get(BASE)),
                found.seconds,
            )
        )
    return rows


def _ratios(found: Measured, base: Measured | None) -> tuple[float, float, float] | None:
    if base is None:
        return None
    each = [mine / theirs for mine, theirs in zip(found.seconds, base.seconds, strict=True)]
    return statistics.median(each), min(each), max(each)


def table(rows: Sequence[StepSummary]) -> str:
    """Format rows as Markdown; columns without any value are left out."""
    columns: dict[str, list[str]] = {
        "step": [row.step for row in rows],
        "s a step": [f"{row.seconds:.3g}" for row in rows],
        "pairs/s": [f"{row.pairs_per_second:.4g}" for row in rows],
        "time / open_clip's": [_ratio(row.of_peer) for row in rows],
        "time / ITC, SACL": [_ratio(row.of_itc) for row in rows],
        "FLOP/s of a device": [_flops(row.flops_per_second) for row in rows],
        "MFU": [f"{row.mfu:.1%}" if row.mfu else "" for row in rows],
        "peak GB": [f"{row.bytes / 1e9:.3g}" if row.bytes else "" for row in rows],
        "loss's share": [f"{row.loss_share:.1%}" if row.loss_share else "" for row in rows],
    }
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    lines = [list(shown), ["---"] + ["---:"] * (len(shown) - 1), *map(list, zip(*shown.values(), strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flops(rate: float | None) -> str:
    """Format a FLOP count: '41.2 G'."""
    return flops_text(rate).removesuffix("FLOP") if rate else ""


def _ratio(of: tuple[float, float, float] | None) -> str:
    return f"{of[0]:.2f} ({of[1]:.2f}–{of[2]:.2f})" if of and of[1] < of[2] else f"{of[0]:.2f}" if of else ""


def as_json(rows: Sequence[StepSummary]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _half_of(row: StepSummary) -> tuple[float, float]:
    """Return how far below and above the median the middle half of the rounds reaches."""
    low, middle, high = statistics.quantiles(row.rounds * 2 if len(row.rounds) == 1 else row.rounds, method="inclusive")
    return middle - low, high - middle


def plot(rows: Sequence[StepSummary], heading: str, path: Path) -> None:
    """Plot seconds a step, the loss's part dark, and memory; a line marks open_clip with our towers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    memory = any(row.bytes for row in rows)
    wide = 10.5 if memory else 7.5
    figure, axes = plt.subplots(
        1, 1 + memory, figsize=(wide, 1.3 + 0.36 * len(rows)), squeeze=False, sharey=True, layout="constrained"
    )
    places = range(len(rows))
    colours = ["#9a9a9a" if row.step.startswith("open_clip") else "#2f6db3" for row in rows]
    axis = axes[0, 0]
    spread = list(zip(*(_half_of(row) for row in rows), strict=True))
    axis.barh(places, [row.seconds for row in rows], color=colours, xerr=spread, ecolor="#444444")
    shares = [(row.loss_share or 0) * row.seconds for row in rows]
    axis.barh(places, shares, color="#17324f", label="contrastive loss alone")
    axis.set_xlabel("seconds a step (median; line: the middle half of the rounds)")
    if any(shares):
        axis.legend(fontsize=8, loc="lower right", frameon=False)
    if memory:
        axes[0, 1].barh(places, [(row.bytes or 0) / 1e9 for row in rows], color=colours)
        axes[0, 1].set_xlabel("GB at the peak")
    peer = next((row for row in rows if row.step == EQUAL), None)
    for column, value in enumerate([peer.seconds, (peer.bytes or 0) / 1e9] if peer else []):
        if column < axes.shape[1] and value:
            axes[0, column].axvline(value, color="#c0392b", linewidth=0.9, linestyle="--")
    axis.set_yticks(places, [row.step for row in rows], fontsize=9)
    axis.invert_yaxis()
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)
