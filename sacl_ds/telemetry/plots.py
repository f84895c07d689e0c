"""Plots of a run from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sacl_ds.telemetry.records import METRICS, read


def plot_run(run_folder: Path, task: str = "retrieval") -> list[Path]:
    """Write plots/losses.png, and plots/TASK.png where it was evaluated; returns what was written."""
    lines = read(run_folder / METRICS)
    folder = run_folder / "plots"
    folder.mkdir(exist_ok=True)
    written = []
    training = [line for line in lines if "loss" in line]
    if training:
        written.append(_losses(training, folder / "losses.png"))
    evaluations = [line for line in lines if "evaluation" in line]
    if evaluations:
        written.append(_held_out(evaluations, folder / f"{task}.png"))
    return written


def _losses(lines: list[dict[str, Any]], path: Path) -> Path:
    shown = [term for term in _TERMS if any(term[0] in line for line in lines)] or [("loss", "loss")]
    informed = [each for each in _INFORMATION if each[0] in lines[0]]
    panels = len(shown) + bool(informed)
    figure, axes = _panels(panels, 2.8, 2.3, 1.6 if informed else 0.0)
    steps = [line["step"] for line in lines]
    for axis, (name, label) in zip(axes, shown, strict=False):
        values = [float(line[name]) for line in lines]
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(steps, _smooth(values), color="tab:blue")
        axis.set(title=label, xlabel="step")
    for axis in axes:
        axis.locator_params(nbins=5)  # a panel is narrow
    if informed:
        axis = axes[-1]
        for name, label in informed:
            axis.plot(steps, _smooth([float(line[name]) for line in lines]), label=label)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set(title="mutual information (nats)", xlabel="step")
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
    return path


_TERMS = (("itc", "contrastive (ITC)"), ("itm", "matching (ITM)"), ("mlm", "masked language (MLM)"))
_INFORMATION = (
    ("pmi_positive", "PMI, positives"),
    ("pmi_negative", "PMI, negatives"),
    ("pmi_negative_target", "E log 1/w"),
    ("infonce_bound", "InfoNCE bound"),
)


def _held_out(lines: list[dict[str, Any]], path: Path) -> Path:
    figure, (axis,) = _panels(1, 4.8, 2.8, 1.7)
    names = [name for name in lines[-1]["evaluation"] if not name.endswith("R@5")]
    for number, name in enumerate(names):
        colour = f"C{number}" if len(names) <= 10 else colormaps["tab20"](number % 20)
        label = name.replace("_to_", "→").replace("_", " ")
        known = [line for line in lines if name in line["evaluation"]]  # an older version may have begun the run
        values = [100 * line["evaluation"][name] for line in known]
        axis.plot([line["step"] for line in known], values, "o-", markersize=3, color=colour, label=label)
        chance = lines[-1]["chance"][name]
        axis.axhline(100 * chance, color=colour, linestyle=":", linewidth=0.8)
    axis.set(xlabel="step", ylabel="%  (dotted: chance)", title=f"held-out {path.stem}")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
    return path


def _panels(count: int, width: float, height: float, beside: float) -> tuple[Figure, list[Axes]]:
    """Make panels of `width` by `height` inches in a row, with room `beside` the last one for its legend.

    Their positions are given: a layout engine would draw all of it several times to find them.
    """
    left, right, bottom, top = 0.6, 0.1, 0.5, 0.35
    pitch = left + width + right
    size = (count * pitch + beside, bottom + height + top)
    figure = Figure(figsize=size)
    inside = [(number * pitch + left, bottom, width, height) for number in range(count)]
    axes = [figure.add_axes((x / size[0], y / size[1], w / size[0], h / size[1])) for x, y, w, h in inside]
    return figure, axes


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Average over a centred window, a share of the curve."""
    half = int(len(values) * share / 2)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
