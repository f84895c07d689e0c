"""Pictures of the analysis tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from sacl_ds.losses.distribution import EDGES

if TYPE_CHECKING:
    from sacl_ds.analysis.calibrate import Calibrated
    from sacl_ds.analysis.ranking import Curve

_TITLES = {"image_to_text": "image anchors, texts weighed", "text_to_image": "text anchors, images weighed"}


def weight_histograms(drawn: Sequence[tuple[str, Mapping[str, np.ndarray]]], path: Path) -> None:
    """Share of the negatives by weight, above as a histogram (paper Fig. 3b), below added up from the lowest, where the
    few that weigh little show; one column a direction, one line a subject.

    drawn: (label, {direction: counts between EDGES}). What lies under the first or above the last edge is counted in
    the outermost bins.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10.0, 6.6), layout="constrained", sharey="row", sharex=True)
    inner = np.array(EDGES[1:-1])
    low, high, least = len(inner) - 2, 0, 100.0
    for column, (direction, title) in enumerate(_TITLES.items()):
        above, below = axes[0, column], axes[1, column]
        for number, (label, found) in enumerate(drawn):
            counts = found[direction].astype(float)
            counts *= 100 / max(1.0, counts.sum())
            shares = counts[1:-1].copy()
            shares[0] += counts[0]
            shares[-1] += counts[-1]
            above.stairs(shares, inner, color=f"C{number}", label=label, linewidth=1.5)
            if len(drawn) == 1:
                above.stairs(shares, inner, color=f"C{number}", alpha=0.25, fill=True)
            cumulative = np.cumsum(counts)[:-1]  # at each of the inner edges
            below.plot(inner, np.where(cumulative > 0, cumulative, np.nan), color=f"C{number}", label=label)
            there = np.flatnonzero(shares > 0)
            if len(there):
                low, high = min(low, there[0]), max(high, there[-1])
                least = min(least, cumulative[cumulative > 0].min(initial=100.0))
        above.set_title(title)
        for axis in (above, below):
            axis.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
        below.set(yscale="log", xlabel="weight of a negative (mean 1)")
    axes[0, 0].set_ylabel("% of negatives in a bin (1/20 decade)")
    axes[1, 0].set_ylabel("% of negatives under a weight")
    axes[1, 0].set_ylim(least / 1.5, 150)
    _weight_axis(axes[1, 0], inner[max(0, low - 2)], inner[min(len(inner) - 1, high + 3)])
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def share_curves(curves: Mapping[str, Calibrated], share: float, under: float, path: Path) -> None:
    """Plot the share of negatives under a weight against the sharpness, and mark the calibrated one."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for number, (name, found) in enumerate(curves.items()):
        reached = "not reached" if found.sharpness is None else f"{found.sharpness:.3g}"
        axis.plot(found.grid, 100 * found.shares, color=f"C{number}", label=f"{name}: {reached}")
        if found.sharpness is not None:
            axis.plot([found.sharpness], [100 * found.share], "o", color=f"C{number}")
    axis.axhline(100 * share, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="sharpness", ylabel=f"% of negatives under {under:g}")
    _plain_ticks(axis, *axis.get_xlim())
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def fall_curve(cosines: np.ndarray, threshold: float, sharpness: float, share: float, path: Path) -> None:
    """Plot the distribution of the teacher's cosines, and the weight that falls from `threshold` on (1 where it is
    flat)."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axis.hist(cosines.ravel(), 120, color="C0", alpha=0.5)
    axis.set(yscale="log", xlabel="cosine of the teacher", ylabel="pairs in the mini-batches")
    axis.axvline(threshold, color="grey", linewidth=0.8, linestyle=":")
    weight = axis.twinx()
    x = np.linspace(cosines.min(), cosines.max(), 400)
    weight.plot(x, 1 / (1 + np.exp(np.clip(sharpness * (x - threshold), None, 700))), color="C3")
    weight.set(ylabel="weight, relative to the flat part", ylim=(0, 1.05))
    axis.set_title(f"{100 * share:.3g} % of the pairs lie above {threshold:.3f}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def detector_curves(curves: Mapping[str, Mapping[str, Mapping[str, Curve]]], path: Path) -> None:
    """Plot a row of panels a truth: precision over recall, and the ROC. curves: {truth: {direction: {detector:
    curve}}}."""
    titles = [(truth, direction) for truth, directions in curves.items() for direction in directions]
    figure, axes = plt.subplots(len(titles), 2, figsize=(9.0, 3.7 * len(titles)), layout="constrained", squeeze=False)
    for row, (truth, direction) in enumerate(titles):
        for number, (name, curve) in enumerate(curves[truth][direction].items()):
            style = {"color": f"C{number}", "linewidth": 1.5}
            axes[row, 0].plot(curve.recall, curve.precision, label=f"{name}: AP {curve.average_precision:.3f}", **style)
            axes[row, 1].plot(
                [0, *curve.false_positive, 1], [0, *curve.recall, 1], label=f"{name}: AUC {curve.auc:.3f}", **style
            )
            axes[row, 0].axhline(curve.chance, color="grey", linewidth=0.8, linestyle=":")
        axes[row, 1].plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        where = f"{truth}, {direction.replace('_to_', '→')}"
        axes[row, 0].set(
            title=where, xlabel="share of false negatives found", ylabel="share of what is found that is false"
        )
        axes[row, 1].set(
            title=where, xlabel="share of true negatives taken for false", ylabel="share of false negatives found"
        )
        for axis in axes[row]:
            axis.set(xlim=(0, 1), ylim=(0, 1.02))
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _weight_axis(axis: Axes, low: float, high: float) -> None:
    axis.set(xscale="log", xlim=(low, high))
    _plain_ticks(axis, low, high)


def _plain_ticks(axis: Axes, low: float, high: float) -> None:
    """1, 2 and 5 of each decade as plain numbers; only 1 over more than four decades."""
    steps = (1,) if high / low > 1e4 else (1, 2, 5)
    ticks = [step * 10.0**decade for decade in range(-6, 7) for step in steps if low <= step * 10.0**decade <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
