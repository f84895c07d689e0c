"""The parts of a report that are made of what the run has written: settings, records, metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sacl_ds.analysis.report import plots
from sacl_ds.analysis.report.page import Plot, Section, Table, percent, shown
from sacl_ds.config import RunConfig
from sacl_ds.data.scene_language import Caption, relevance
from sacl_ds.data.scenes import DETAILS, Scenes, place_of
from sacl_ds.data.sources import scene_size
from sacl_ds.errors import UserError
from sacl_ds.losses.distribution import EDGES, THRESHOLDS
from sacl_ds.telemetry.records import DIRECTIONS, FOLDER, METRICS, QUANTILES, read, read_figures, read_lowest
from sacl_ds.training.schedules import alpha_end_step

_LENGTHS = {"histogram": len(EDGES) - 1, "quantiles": len(QUANTILES), "under": len(THRESHOLDS)}
_LARGEST = 1e30  # of a figure that can be drawn

Record = dict[str, Any]


def recorded(folder: Path, until: int | None = None) -> tuple[list[Record], list[Record], list[Record]]:
    """(figures, the lightest pairs of the last step, lines of metrics.jsonl), up to that step. Raises UserError where
    there are no records, or what stands there cannot be a run's."""
    figures, metrics, last = read_figures(folder), read(folder / METRICS), None
    if until is not None:
        figures, metrics = ([line for line in lines if line["step"] <= until] for lines in (figures, metrics))
        if not figures:
            raise UserError(
                f"{folder / FOLDER}: no step up to {until} was recorded; give a later checkpoint, or {folder}"
            )
        last = figures[-1]["step"]
    lowest = read_lowest(folder, last)
    here = f"{folder / FOLDER}: the record of step"
    for record in figures:
        if wrong := _wrong_figures(record):
            raise UserError(f"{here} {record['step']} has {wrong}; remove its file")
    for step in sorted({record["step"] for record in figures}):
        if sorted(record["direction"] for record in figures if record["step"] == step) != sorted(DIRECTIONS):
            raise UserError(f"{here} {step} has not one row a direction; remove its file")
    for line in metrics:
        if wrong := _wrong_line(line):
            raise UserError(f"{folder / METRICS}: a line of step {line['step']} has {wrong}; remove it")
    return figures, lowest, metrics


def _wrong_figures(record: Record) -> str | None:
    for name, length in _LENGTHS.items():
        if len(record[name]) != length or not all(map(_is_number, record[name])):
            return f"not {length} numbers under {name!r}"
    if not all(0 <= count < 2**53 for count in (record["step"], record["pairs"], *record["histogram"])):
        return "counts that no run has"
    too_large = (name for name, value in record.items() if isinstance(value, float) and abs(value) > _LARGEST)
    found = next(too_large, None)
    return f"a figure {found!r} that cannot be drawn" if found else None


def _wrong_line(line: Record) -> str | None:
    if not 0 <= line["step"] < 2**53:
        return "a step that no run has"
    if not _is_number(line.get("duplicate_pairs", 0)):
        return "no number under 'duplicate_pairs'"
    for name in ("evaluation", "chance"):
        figures = line.get(name, {})
        if not isinstance(figures, dict) or not all(isinstance(value, (int, float, str)) for value in figures.values()):
            return f"no figures under {name!r}"
    return None if line.get("evaluation", True) else "no figures under 'evaluation'"


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, or the text that stands for an unknown one."""
    return type(value) in (int, float) and (abs(value) <= _LARGEST or math.isnan(value))


ARROWS = {"image_to_text": "image → text", "text_to_image": "text → image"}
_INFORMATION = (
    ("pmi_positive", "PMI, positives", "#2468b4", "-"),
    ("pmi_negative", "PMI, negatives", "#cf6a12", "-"),
    ("pmi_negative_target", "E log 1/w", "#cf6a12", "--"),
    ("infonce_bound", "InfoNCE bound", "#777777", "-."),
)


def about(run: RunConfig, folder: Path, figures: Sequence[Record], metrics: Sequence[Record]) -> Section:
    """Describe the run: the settings that matter, alpha's schedule, the final evaluation."""
    loss, data = run.loss, run.data
    regulated = loss.contrastive == "sacl"
    kappa_t = loss.sharpness if loss.teacher_sharpness is None else loss.teacher_sharpness
    teacher = "none"
    if run.uses_teacher:
        teacher = run.teacher.checkpoint or f"trained first, {run.teacher.steps} steps"
    where = f"scenes, seed {data.scenes.seed}" if data.source == "scenes" else data.shards
    settings = [
        ("run directory", str(folder)),
        ("steps done", f"{_last_step(figures, metrics)} of {run.train.steps}"),
        ("pairs in a batch", str(run.train.global_batch_size)),
        ("data", where if isinstance(where, str) else ", ".join(where or [])),
        ("model", f"{run.model.preset}: {run.model.image_encoder}, {run.model.image_size} px"),
        ("contrastive loss", loss.contrastive if regulated else "infonce: every negative weighs 1"),
    ]
    if regulated:
        settings += [
            ("sharpness κ", shown(loss.sharpness)),
            ("teacher's sharpness κ_t", shown(kappa_t) if run.uses_teacher else "–"),
            ("teacher", teacher),
            ("α, the teacher's share", _schedule(run)),
            ("mean weight of negatives", shown(loss.negative_mass)),
            *([("removed under weight", shown(loss.drop_below))] if loss.drop_below is not None else []),
        ]
    settings += [("same pair if equal", data.duplicates), ("seed", str(run.seed))]
    tables = [Table("Settings", [], settings, words=True)]
    evaluation = next((line for line in reversed(metrics) if "evaluation" in line), None)
    numbers: dict[str, Any] = {"settings": run.model_dump(mode="json"), "evaluation": None}
    if evaluation:
        values, chance = evaluation["evaluation"], evaluation.get("chance", {})
        rows = [(_name(n), percent(_number(v)), percent(_number(chance.get(n)))) for n, v in values.items()]
        tables.append(Table(f"Held-out evaluation after {evaluation['step']} steps", ["", "value", "chance"], rows))
        numbers["evaluation"] = {"step": evaluation["step"], "values": values, "chance": chance}
    return Section("run", "The run", tables=tables, numbers=numbers)


def distribution(figures: Sequence[Record], folder: Path) -> Section:
    """Plot the weights in the last record: histogram (paper Fig. 3b), share under thresholds."""
    last = _last(figures)
    counts = {direction: np.asarray(record["histogram"]) for direction, record in last.items()}
    step = next(iter(last.values()))["step"]
    pairs = sum(record["pairs"] for record in last.values())
    section = Section("weights", "Weights of the negatives")
    section.text = [
        f"What all {shown(pairs)} pairs of an anchor and a negative weighed in the global batch of step {step}. The "
        "dotted line marks 1, the weight of every negative in InfoNCE; false negatives are to lie far left of it."
    ]
    for name, title, alt, draw in (
        (
            "weights_histogram",
            "Histogram",
            "Histogram of the weights of the negatives, both directions",
            plots.histogram,
        ),
        ("weights_cumulative", "Share under a weight", "Share of the negatives under each weight", plots.cumulative),
    ):
        draw(folder / f"{name}.png", np.array(EDGES), counts)
        section.plots.append(Plot(folder / f"{name}.png", title, f"{alt}, at step {step}."))
    header = ["", *(f"< {threshold:.1f}" for threshold in THRESHOLDS)]
    rows = [(ARROWS[d], *(percent(share) for share in record["under"])) for d, record in last.items()]
    section.tables.append(Table("Share of negatives under a weight", header, rows))
    rows = [(ARROWS[d], *(shown(value) for value in record["quantiles"])) for d, record in last.items()]
    section.tables.append(Table("Quantiles of the weights", ["", *(f"{100 * q:g} %" for q in QUANTILES)], rows))
    section.numbers = {"step": step, "edges": EDGES, "thresholds": THRESHOLDS, "quantiles_at": list(QUANTILES),
                       "directions": last}  # fmt: skip
    return section


def training(figures: Sequence[Record], folder: Path) -> Section:
    """Plot the weights' distribution over training: quantiles, effective number, alpha, kappa, mass and shape."""
    section = Section("training", "Over training")
    section.text = [
        "Mass is what the weights add to the log-sum of all negatives: how much harder (above 0) or softer (below) "
        "they are pushed away than by InfoNCE. Shape is how far the push is moved among them, as KL divergence. The "
        "effective number of negatives is (Σw)² / Σw²; where it falls to a small share, few negatives do all the work."
    ]
    per = {d: [r for r in figures if r["direction"] == d] for d in DIRECTIONS}
    steps = {d: [r["step"] for r in records] for d, records in per.items()}

    def add(name: str, title: str, alt: str, note: str = "") -> None:
        section.plots.append(Plot(folder / f"{name}.png", title, alt, note))

    for d, records in per.items():
        name = f"quantiles_{d}"
        plots.bands(folder / f"{name}.png", steps[d], np.array([r["quantiles"] for r in records]), QUANTILES, d)
        add(name, f"Weights, {ARROWS[d]}", f"Quantile bands of the weights over training steps, {plots.LABELS[d]}.")

    def both(figure: str) -> dict[str, tuple[Sequence[float], Sequence[float], str, str]]:
        return {ARROWS[d]: (steps[d], [r[figure] for r in per[d]], plots.COLOURS[d], "-") for d in DIRECTIONS}

    plots.lines(folder / "effective.png", both("effective_share"), "of the negatives", share=True, bottom=0.0, top=1.05)
    add("effective", "Effective number of negatives", "Effective share of the negatives over training steps.",
        "as share of all of them")  # fmt: skip
    curves = {}
    for figure, style in (("mass", "-"), ("shape", "--")):
        for d in DIRECTIONS:
            label = f"{figure}, {ARROWS[d]}"
            curves[label] = steps[d], [r[figure] for r in per[d]], plots.COLOURS[d], style
    plots.lines(folder / "mass_and_shape.png", curves, "nats", zero=True)
    add("mass_and_shape", "Mass and shape", "Mass and shape of the regulation over training steps.")
    first = per[DIRECTIONS[0]]
    x = steps[DIRECTIONS[0]]
    alpha = {"α": (x, [r["alpha"] for r in first], "#2468b4", "-")}
    plots.lines(folder / "alpha.png", alpha, "α", bottom=0.0, top=1.05)
    add("alpha", "α, the teacher's share of the similarity", "Alpha over training steps.")
    sharp = {
        "κ": (x, [r["sharpness"] for r in first], "#2468b4", "-"),
        "κ_t": (x, [r["teacher_sharpness"] for r in first], "#2468b4", "--"),
        "logit scale": (x, [r["logit_scale"] for r in first], "#777777", "-."),
    }
    plots.lines(folder / "sharpness.png", sharp, "", bottom=0.0)
    add("sharpness", "Sharpness and logit scale", "Sharpness of student and teacher, and logit scale, over steps.",
        "κ has to stay well below the logit scale")  # fmt: skip
    section.numbers = {"records": list(figures)}
    return section


def information(figures: Sequence[Record], metrics: Sequence[Record], folder: Path) -> Section | None:
    """Plot mutual information over training; None where nothing of it is known."""
    lines = [line for line in metrics if "pmi_positive" in line]
    source = "metrics.jsonl"
    if not lines:  # records hold one value for both directions
        lines, source = [r for r in figures if r["direction"] == DIRECTIONS[0]], "weights/"
    curves, numbers = {}, {}
    for name, label, colour, style in _INFORMATION:
        points = [(line["step"], _number(line.get(name))) for line in lines]
        known = [(step, value) for step, value in points if value is not None and np.isfinite(value)]
        if known:
            x, y = zip(*known, strict=True)
            curves[label] = x, y, colour, style
            numbers[name] = {"step": list(x), "value": list(y)}
    if not curves:
        return None
    plots.lines(folder / "mutual_information.png", curves, "nats", zero=True)
    alt = (
        "Mean pointwise mutual information of positives and of negatives, its heuristic target, and InfoNCE's bound, "
        "over training steps."
    )
    plot = Plot(folder / "mutual_information.png", "Pointwise mutual information", alt)
    text = (
        "The critic's estimate log (w e^z / mean w e^z), averaged over positives and over negatives that weigh; the "
        "mean inside is over the positive and all negatives, those that were removed with w = 0. The paper's "
        "heuristic says that regulation leaves the negatives' near E log 1/w where InfoNCE drives it down; over truly "
        "independent pairs that mean is a negative KL divergence and cannot reach it. InfoNCE's bound is "
        "log(1 + negatives) - InfoNCE loss, over all negatives without weights."
    )
    last = [(label, shown(y[-1])) for label, (_, y, _, _) in curves.items()]
    table = Table(f"At step {lines[-1]['step']} (nats)", [], last)
    return Section("information", "Mutual information", [text], [plot], [table], numbers={"source": source, **numbers})


def duplicates(figures: Sequence[Record], metrics: Sequence[Record], batch: int) -> Section:
    """Report pairs of the global batch that are no negatives of each other, and the run's own cautions."""
    section = Section("duplicates", "Duplicates and cautions")
    lines = [(line["step"], line["duplicate_pairs"]) for line in metrics if "duplicate_pairs" in line]
    source = "logged"
    if not lines:
        lines = [(r["step"], r["duplicates"]) for r in figures if r["direction"] == DIRECTIONS[0]]
        source = "recorded"
    counts = [count for _, count in lines]
    if counts:
        with_some = sum(count > 0 for count in counts)
        mean, possible = sum(counts) / len(counts), batch * (batch - 1) / 2
        section.text.append(
            f"Pairs that share an image or a caption are left out of each other's negatives. Of {shown(len(counts))} "
            f"{source} steps {shown(with_some)} had such pairs: {shown(mean)} a step on average, {shown(max(counts))} "
            f"at most, of {shown(int(possible))} that a batch of {batch} has."
        )
        most = max(lines, key=lambda line: line[1])
        section.numbers = {"steps": len(counts), "steps_with_duplicates": with_some, "mean": mean,
                           "largest": {"step": most[0], "duplicate_pairs": most[1]}}  # fmt: skip
    else:
        section.text.append("No step of this run says how many duplicates it had.")
    cautions = [{"step": line["step"], "caution": str(line["caution"])} for line in metrics if "caution" in line]
    section.numbers["cautions"] = cautions
    if cautions:
        rows = [(str(each["step"]), each["caution"]) for each in cautions]
        section.tables.append(Table("Cautions", ["step", ""], rows, words=True))
    else:
        section.text.append("The run's log holds no caution.")
    return section


def _last(figures: Sequence[Record]) -> dict[str, Record]:
    step = max(record["step"] for record in figures)
    return {d: r for d in DIRECTIONS for r in figures if r["step"] == step and r["direction"] == d}


def _last_step(figures: Sequence[Record], metrics: Sequence[Record]) -> int:
    return max([record["step"] for record in figures] + [line["step"] for line in metrics if "step" in line])


def _schedule(run: RunConfig) -> str:
    loss = run.loss
    if not run.uses_teacher:
        return "0: no teacher"
    if loss.alpha_start == loss.alpha_end:
        return f"{loss.alpha_end:g} throughout"
    return f"{loss.alpha_start:g} to {loss.alpha_end:g}, linearly until step {alpha_end_step(run)}"


def _name(figure: str) -> str:
    return figure.replace("_to_", " → ").replace("_", " ")


def _number(value: Any) -> float | None:
    """Convert a value of metrics.jsonl, which holds NaN and infinities as text, to a float or None."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


class SceneTruth:
    """Pictures and relevance of the scenes that a run is trained or evaluated on."""

    def __init__(self, run: RunConfig) -> None:
        self._size, self._first = scene_size(run.model.image_size), run.data.scenes.detail
        self._captions = lru_cache(4096)(self._find_caption)

    def picture(self, key: str) -> Image.Image | None:
        """Draw the scene with that key; None for a key that is no scene's."""
        place = place_of(key)
        return None if place is None else Image.fromarray(self._scenes(*place).image(place[1]))

    def relevance(self, caption_key: str, caption: str, picture_key: str) -> float | None:
        """Share of the caption's statements that hold in the picture, 1.0 where it is true of it; None where it cannot
        be known: keys of no scene, a caption that was not written for the scene of caption_key."""
        written, place = self._captions(caption_key, caption), place_of(picture_key)
        if written is None or place is None:
            return None
        return float(relevance([written], [self._scenes(*place).scene(place[1])])[0, 0])

    def table(self, keys: Sequence[str], captions: Sequence[str]) -> np.ndarray:
        """(n, n) float32: `relevance` of caption i to the picture of key j, NaN where it cannot be known."""
        written = [self._captions(key, caption) for key, caption in zip(keys, captions, strict=True)]
        places = [place_of(key) for key in keys]
        found = np.full((len(keys), len(keys)), np.nan, np.float32)
        rows = [row for row, caption in enumerate(written) if caption is not None]
        columns = [column for column, place in enumerate(places) if place is not None]
        said = [caption for caption in written if caption is not None]
        scenes = [self._scenes(*place).scene(place[1]) for place in places if place is not None]
        if said and scenes:
            found[np.ix_(rows, columns)] = relevance(said, scenes)
        return found

    def _find_caption(self, key: str, text: str) -> Caption | None:
        place = place_of(key)
        if place is None:
            return None
        for detail in sorted(DETAILS, key=lambda each: each != self._first):
            for caption in self._scenes(*place, detail).captions(place[1]):
                if caption.text == text:
                    return caption
        return None

    def _scenes(self, seed: int, index: int, detail: str = "partial") -> Scenes:
        return Scenes(index + 1, seed, self._size, detail)


def truth_of(run: RunConfig) -> SceneTruth | None:
    """Return the truth about a run's pairs, or None for data of which nothing is known."""
    return SceneTruth(run) if run.data.source == "scenes" else None


def verdict(relevance: float | None, what: str) -> tuple[str, bool | None]:
    """(badge, good) for a false negative: 'true of the picture' or how much of the caption holds."""
    if relevance is None:
        return "", None
    if relevance == 1.0:
        return f"true {what}", True
    return f"{relevance:.0%} of it holds", False
