"""detect: how well low weights find false negatives, where these are known."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sacl_ds.analysis.device import device_named
from sacl_ds.analysis.inputs import Examined, batch_of, described, examine, kept, regulation_for
from sacl_ds.analysis.pairs import is_features
from sacl_ds.analysis.ranking import Curve, Detector, spearman
from sacl_ds.analysis.subject import load_subject, read_pairs
from sacl_ds.analysis.terminal import progress, say, table
from sacl_ds.analysis.truth import GradedNegatives, questions
from sacl_ds.data.scene_source import SceneSource
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.sources import HELD_OUT, scene_size
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.losses.distribution import THRESHOLDS


def detectors(regulation: Regulation, teacher: bool) -> dict[str, Regulation]:
    """Return the regulations of model and teacher alone, and of both as the run mixes them.

    A side whose sharpness is 0 in the run is given 1, since its weights alone would all be equal.
    """
    whole = replace(regulation, negative_mass=1.0, drop_below=None)
    found = {"model": replace(whole, alpha=0.0, sharpness=whole.sharpness or 1.0)}
    if teacher:
        found["teacher"] = replace(whole, alpha=1.0, teacher_sharpness=whole.teacher_sharpness or 1.0)
        if 0 < whole.alpha < 1:
            found["mixture"] = whole
    return found


def detection(question: GradedNegatives, regulation: Regulation) -> tuple[dict[str, Any], Curve]:
    """Figures, and the curves of -log w as a score for false negatives, over all anchors and their negatives.

    Figures: auc, average_precision, chance (the average precision of random scores), at_weight: for each of THRESHOLDS
    the share of negatives under it, the share of false negatives among all found (recall), and of these that are false
    negatives (precision); rank_correlation of -log w with graded relevance over all pairs, and its mean within anchors.
    """
    positives = []
    under, false_under = (np.zeros(len(THRESHOLDS), np.int64) for _ in "ab")
    for log_weights, negatives, relevance in question.tiles(regulation):
        chosen = log_weights[negatives & (relevance == 1)]
        positives.append(-chosen)
        for each, values in ((under, log_weights[negatives]), (false_under, chosen)):
            each += np.searchsorted(np.sort(values), np.log(THRESHOLDS), "left")
    found = np.concatenate(positives)
    if not len(found):
        raise UserError(
            f"{question.truth}, {question.direction}: there is no false negative among these pairs; take more"
        )
    detector = Detector(found)
    scores, grades, within = [], [], []
    for log_weights, negatives, relevance in question.tiles(regulation):
        detector.add(-log_weights[negatives & (relevance < 1)])
        if not question.graded:
            continue
        scores.append(-log_weights[negatives])
        grades.append(relevance[negatives])
        within += [spearman(-w[stays], r[stays]) for w, stays, r in zip(log_weights, negatives, relevance, strict=True)]
    curve = detector.curve()
    total = curve.positives + curve.negatives
    figures: dict[str, Any] = {
        "anchors": len(question.anchors),
        "negatives": total,
        "false_negatives": curve.positives,
        "auc": curve.auc,
        "average_precision": curve.average_precision,
        "chance": curve.chance,
        "rank_correlation": _mean([spearman(np.concatenate(scores), np.concatenate(grades))] if scores else []),
        "rank_correlation_within_anchors": _mean(within),
        "at_weight": [
            {
                "under": float(threshold),
                "share": float(count / total),
                "recall": float(hits / curve.positives),
                "precision": float(hits / count) if count else None,
            }
            for threshold, count, hits in zip(THRESHOLDS, under, false_under, strict=True)
        ],
    }
    return figures, curve


def act(options: argparse.Namespace) -> None:
    """Run the subcommand `detect`."""
    examined = _examined(options)
    regulation = regulation_for(examined, options)
    asked = questions(examined.pairs)
    by = detectors(regulation, examined.pairs.teacher is not None)
    figures: dict[str, Any] = {}
    curves: dict[str, dict[str, dict[str, Curve]]] = {}
    with progress("detect", len(asked) * len(by), "detectors") as done:
        for question in asked:
            for name, each in by.items():
                made, curve = detection(question, each)
                figures.setdefault(question.truth, {}).setdefault(question.direction, {})[name] = made
                curves.setdefault(question.truth, {}).setdefault(question.direction, {})[name] = curve
                done(1)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    whole = {
        "path": options.path,
        "step": examined.step,
        "pairs": len(examined.pairs),
        "detectors": {name: described(each) for name, each in by.items()},
        "truths": figures,
    }
    (out / "detection.json").write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n")
    from sacl_ds.analysis.plots import detector_curves

    detector_curves(curves, out / "detection.png")
    _print(figures)
    say(f"written: {out}/detection.json, detection.png")


def _examined(options: argparse.Namespace) -> Examined:
    if options.coco and not options.images:
        raise UserError("--coco needs --images, the folder of COCO's images")
    if is_features(options.path):
        if options.coco or options.scenes:
            raise UserError(
                f"{options.path} already holds features; give the run in its place, or leave out what to read"
            )
        return examine(options.path, options)
    subject = load_subject(options.path, options.teacher, device_named(options.device))
    run = subject.run
    if options.coco:
        from sacl_ds.analysis.coco import coco_images, coco_pairs

        found = coco_images(Path(options.coco), Path(options.images))
        with progress("features", len(found), "images") as done:
            pairs = coco_pairs(subject, found, batch_of(subject), done)
    else:
        if run.data.source != "scenes" and options.scenes is None:
            raise UserError(
                f"{options.path} learned from shards, of which the truth is not known; give --coco, or --scenes N"
            )
        count = run.data.scenes.eval_count if options.scenes is None else options.scenes
        if count < 2:
            raise UserError(f"--scenes {count}: at least 2")
        source = SceneSource(Scenes(count, run.data.scenes.seed + HELD_OUT, scene_size(run.model.image_size)))
        with progress("features", count, "scenes") as done:
            pairs = read_pairs(subject, source, None, batch_size=batch_of(subject), progress=done)
    return kept(Examined(options.path, pairs, run, subject.step), options)


def _print(figures: dict[str, Any]) -> None:
    rows = []
    for truth, directions in figures.items():
        for direction, by in directions.items():
            for name, each in by.items():
                correlation = each["rank_correlation"]
                rows.append(
                    [
                        truth,
                        direction.replace("_to_", "→"),
                        name,
                        f"{each['auc']:.3f}",
                        f"{each['average_precision']:.3f}",
                        f"{each['chance']:.3f}",
                        "" if correlation is None else f"{correlation:.3f}",
                        f"{each['false_negatives']} of {each['negatives']}",
                    ]
                )
    headings = ["truth", "anchors", "weights of", "AUC", "AP", "chance", "rank corr.", "false negatives"]
    table(headings, rows, left=3)


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else None
