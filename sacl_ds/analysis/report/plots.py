"""The plots of a report, one picture each: they stand side by side where the window is wide, below each other else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

COLOURS = {"image_to_text": "#2468b4", "text_to_image": "#cf6a12"}
LABELS = {"image_to_text": "image anchors over texts", "text_to_image": "text anchors over images"}
_SIZE, _DPI = (5.4, 3.4), 150  # inches; legible at the width of a phone
_GREY = "#777777"
_BANDS = ((0.01, 0.99, 0.16), (0.05, 0.95, 0.22), (0.25, 0.75, 0.35))  # lower, upper, opacity
_FLOOR = 1e-4  # weights are drawn from here on

_TICKS: tuple[Sequence[float], ...] = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")

Series = Sequence[float]


@contextmanager
def _axes(path: Path, size: tuple[float, float] = _SIZE) -> Iterator[Axes]:
    """Make axes in the report's style; saved to `path`, with a legend outside, when the block ends."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.color": "#e4e4e4", "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False,
             "legend.fontsize": 9}  # fmt: skip
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        try:
            yield axis
            handles, names = axis.get_legend_handles_labels()
            if handles:  # outside, where it covers no curve
                rows = -(-len(names) // max(1, 64 // (max(map(len, names)) + 6)))
                columns = -(-len(names) // rows)
                figure.legend(handles, names, loc="outside upper left", ncols=columns, columnspacing=1.4)
            figure.savefig(path, dpi=_DPI, metadata={"Software": None})
        finally:
            plt.close(figure)


def histogram(path: Path, edges: np.ndarray, counts: Mapping[str, np.ndarray]) -> None:
    """Share of the negatives in each bin, both directions. edges: (bins + 1,), counts: (bins,) each."""
    low, high = _drawn(counts.values())
    inner = np.maximum(edges[low : high + 2], _FLOOR / 2)
    if not np.isfinite(inner[-1]):
        inner[-1] = inner[-2] * (inner[-2] / inner[-3])
    with _axes(path) as axis:
        for direction, values in counts.items():
            share = np.asarray(values)[low : high + 1] / max(1, np.sum(values))
            axis.stairs(share, inner, color=COLOURS[direction], fill=True, alpha=0.25)
            axis.stairs(share, inner, color=COLOURS[direction], label=LABELS[direction], linewidth=1.4)
        _even(axis.axvline)
        _weights(axis, "x")
        axis.set(xlabel="weight", ylabel="negatives in the bin")
        axis.yaxis.set_major_formatter(_PERCENT)


def cumulative(path: Path, edges: np.ndarray, counts: Mapping[str, np.ndarray]) -> None:
    """Share of the negatives under each weight."""
    low, high = _drawn(counts.values())
    with _axes(path) as axis:
        for direction, values in counts.items():
            share = np.cumsum(values) / max(1, np.sum(values))
            at = np.arange(max(low - 1, 0), min(high + 1, len(edges) - 2))
            axis.plot(edges[at + 1], share[at], color=COLOURS[direction], label=LABELS[direction])
        _even(axis.axvline)
        _weights(axis, "x")
        axis.set(xlabel="weight", ylabel="negatives under it", ylim=(0, 1.02))
        axis.yaxis.set_major_formatter(_PERCENT)


def bands(path: Path, steps: Series, quantiles: np.ndarray, at: Sequence[float], direction: str) -> None:
    """Quantiles of the weights over training. quantiles: (steps, len(at))."""
    values = np.maximum(np.asarray(quantiles, np.float64), _FLOOR)
    column = {round(q, 4): number for number, q in enumerate(at)}
    colour = COLOURS[direction]
    with _axes(path) as axis:
        for low, high, opacity in _BANDS:
            if low in column and high in column:
                below, above = values[:, column[low]], values[:, column[high]]
                label = f"{low:.0%} to {high:.0%}"
                if len(steps) == 1:
                    axis.plot([steps[0]] * 2, [below[0], above[0]], color=colour, alpha=opacity, linewidth=14,
                              solid_capstyle="butt", label=label)  # fmt: skip
                else:
                    axis.fill_between(steps, below, above, color=colour, alpha=opacity, linewidth=0, label=label)
        axis.plot(steps, values[:, column[0.5]], color=colour, marker=_marker(steps), markersize=4, label="median")
        _even(axis.axhline)
        _weights(axis, "y")
        axis.set(xlabel="step", ylabel="weight")
        _steps(axis)


def lines(
    path: Path,
    curves: Mapping[str, tuple[Series, Series, str, str]],
    label: str,
    *,
    share: bool = False,
    zero: bool = False,
    bottom: float | None = None,
    top: float | None = None,
) -> None:
    """Plot curves: {label: (steps, values, colour, line style)}.

    zero: draw the line at 0; share: values as per cent.
    """
    with _axes(path) as axis:
        for name, (steps, values, colour, style) in curves.items():
            axis.plot(steps, values, style, color=colour, label=name, marker=_marker(steps), markersize=4)
        if zero:
            axis.axhline(0, color=_GREY, linewidth=0.8)
        axis.set(xlabel="step", ylabel=label)
        axis.set_ylim(bottom, top)
        if share:
            axis.yaxis.set_major_formatter(_PERCENT)
        _steps(axis)


def joint(path: Path, edges: np.ndarray, counts: np.ndarray, names: tuple[str, str], title: str) -> None:
    """Plot the joint histogram of two weights of the same pair. counts: (bins, bins), the first name's weight along the
    rows."""
    with _axes(path, (5.4, 4.4)) as axis:
        low, high = _drawn([counts.sum(0), counts.sum(1)])
        inner = edges[low : high + 2].copy()
        inner[0] = max(inner[0], _FLOOR / 2)
        if not np.isfinite(inner[-1]):
            inner[-1] = inner[-2] * 2
        part = counts[low : high + 1, low : high + 1].T.astype(np.float64)
        drawn = axis.pcolormesh(
            inner, inner, np.ma.masked_equal(part, 0), norm=matplotlib.colors.LogNorm(), cmap="viridis", rasterized=True
        )
        axis.plot(inner[[0, -1]], inner[[0, -1]], color=_GREY, linewidth=0.8, linestyle="--")
        _weights(axis, "x")
        _weights(axis, "y")
        axis.set_aspect("equal")
        axis.set_xlabel(f"weight by {_short(names[0])}", parse_math=False)
        axis.set_ylabel(f"weight by {_short(names[1])}", parse_math=False)
        axis.set_title(title, fontsize=10)
        axis.figure.colorbar(drawn, ax=axis, label="pairs")


def _short(name: str, longest: int = 26) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def _drawn(counts: Any) -> tuple[int, int]:
    """Return the first and last non-empty bins, widened by one at each end where possible."""
    total = np.sum([np.asarray(each) for each in counts], 0)
    held = np.flatnonzero(total)
    if not len(held):
        return 0, len(total) - 1
    return max(0, int(held[0]) - 1), min(len(total) - 1, int(held[-1]) + 1)


def _even(draw: Any) -> None:
    """Draw the line at weight 1, which every negative has in InfoNCE."""
    draw(1.0, color=_GREY, linewidth=0.9, linestyle=":")


def _weights(axis: Axes, which: str) -> None:
    """A logarithmic axis whose ticks read as decimal numbers."""
    getattr(axis, f"set_{which}scale")("log")
    ours = axis.xaxis if which == "x" else axis.yaxis
    low, high = sorted(ours.get_view_interval())
    for multiples in _TICKS:  # as few as are enough
        ticks = [m * 10.0**decade for decade in range(-5, 4) for m in multiples]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            break
    ours.set_major_locator(FixedLocator(inside) if high > 3 * low else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ours.set_minor_locator(NullLocator())
    ours.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _steps(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _marker(steps: Series) -> str:
    return "o" if len(steps) < 12 else ""
