"""detect: how well low weights find false negatives, where these are known."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sacl_ds.analysis.inputs import (
    Examined,
    batch_of,
    described,
    device_named,
    examine,
    kept,
    progress,
    regulation_for,
    say,
    table,
)
from sacl_ds.analysis.pairs import Pairs, is_features
from sacl_ds.analysis.ranking import Curve, Detector, spearman
from sacl_ds.analysis.subject import Subject, load_subject, read_pairs
from sacl_ds.analysis.truth import COCO, GradedNegatives, questions
from sacl_ds.data.batch import View
from sacl_ds.data.images import BadImage
from sacl_ds.data.karpathy import KarpathyImage, karpathy_split
from sacl_ds.data.pictures import Picture
from sacl_ds.data.scenes import Scenes, SceneSource
from sacl_ds.data.sources import HELD_OUT, scene_size
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.losses.distribution import THRESHOLDS


@dataclass(frozen=True)
class CocoImage:
    """An image of the test split; captions: (sentid, text)."""

    cocoid: int
    path: Path
    captions: list[tuple[int, str]]


def coco_images(annotations: Path, images: Path) -> list[CocoImage]:
    """The test split of Karpathy's dataset_coco.json. Raises UserError for another file, or missing images."""
    found = []
    for entry in karpathy_split(annotations, "test"):
        if entry.cocoid is None or entry.sentids is None:
            lacks = "cocoid" if entry.cocoid is None else "sentid"
            raise UserError(f"--coco {annotations} is not Karpathy's dataset_coco.json (no {lacks}); give that file")
        captions = list(zip(entry.sentids, entry.captions, strict=True))
        found.append(CocoImage(entry.cocoid, _path(images, entry), captions))
    return found


@torch.no_grad()
def coco_pairs(
    subject: Subject, found: Sequence[CocoImage], batch_size: int, done: Callable[[int], None] = lambda count: None
) -> Pairs:
    """A pair for each caption, with its image's features; the key is COCOID-SENTID. done(n): images encoded.

    Raises UserError for an image that cannot be decoded.
    """
    own = View(CanonicalView(subject.run.model.image_size), subject.tokenizer)
    teacher, device = subject.teacher, subject.device
    image: list[np.ndarray] = []
    teacher_image: list[np.ndarray] = []
    for start in range(0, len(found), batch_size):
        part = found[start : start + batch_size]
        pictures = [_picture(each) for each in part]
        image.append(_array(subject.model.encode_image(_stack(own, part, pictures).to(device))[1]))
        if teacher is not None:
            teacher_image.append(_array(teacher.image_features(_stack(teacher.view, part, pictures).to(device))))
        done(len(part))
    captions = [caption for each in found for _, caption in each.captions]
    text: list[np.ndarray] = []
    teacher_text: list[np.ndarray] = []
    for start in range(0, len(captions), batch_size):
        said = captions[start : start + batch_size]
        text.append(_array(subject.model.encode_text(*_tokens(own, said, device))[1]))
        if teacher is not None:
            teacher_text.append(_array(teacher.text_features(*_tokens(teacher.view, said, device))))
    rows = [row for row, each in enumerate(found) for _ in each.captions]
    ids = np.array([[found[row].cocoid] for row in rows], np.int64)
    return Pairs(
        keys=[f"{each.cocoid}-{sentid}" for each in found for sentid, _ in each.captions],
        shards=[COCO] * len(captions),
        captions=captions,
        image=np.concatenate(image)[rows],
        text=np.concatenate(text),
        teacher_image=np.concatenate(teacher_image)[rows] if teacher_image else None,
        teacher_text=np.concatenate(teacher_text) if teacher_text else None,
        pair_ids=ids,
        logit_scale=float(subject.model.logit_scale().float()),
    )


def _path(images: Path, entry: KarpathyImage) -> Path:
    places = entry.places(images)
    for path in places:
        if path.is_file():
            return path
    raise UserError(
        f"--images {images}: neither {' nor '.join(map(str, places))} exists; give the folder of COCO's images"
    )


def _picture(each: CocoImage) -> Picture:
    try:
        return Picture(each.path.read_bytes())
    except (BadImage, OSError) as error:
        raise UserError(f"{each.path} cannot be decoded: {error}") from None


def _stack(view: View, part: Sequence[CocoImage], pictures: Sequence[Picture]) -> Tensor:
    made = []
    for each, picture in zip(part, pictures, strict=True):
        try:
            made.append(view.image(picture, ()))
        except BadImage as error:
            raise UserError(f"{each.path} cannot be decoded: {error}") from None
    return torch.stack(made)


def _tokens(view: View, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = view.tokenizer.ids(captions)
    ids, mask = (torch.from_numpy(each).to(device) for each in (pad(rows, view.tokenizer.pad_id), attention_mask(rows)))
    return ids, mask


def _array(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


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
