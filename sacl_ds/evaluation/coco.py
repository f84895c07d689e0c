"""COCO's test split by what people have verified: ECCV Caption (Chun et al., ECCV 2022), CxC (Parekh et al., EACL
2021), and the mean over five folds of 1,000 images, all by the package eccv_caption."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sacl_ds.distributed import broadcast_object, rank
from sacl_ds.evaluation.encoding import Encoded
from sacl_ds.evaluation.first_stage import Ranked, rank_candidates
from sacl_ds.evaluation.metrics import chance_recall
from sacl_ds.evaluation.ranking import KS, Figures
from sacl_ds.evaluation.rounds import CocoIds

DEPTH = 64  # of the lists: an image has up to 48 right captions, and ten captions are of none that the package knows
_FOLDS = 5
_DIRECTIONS = {"text_to_image": "t2i", "image_to_text": "i2t"}

_Lists = dict[int, list[int]]  # for each query's id the candidates' ids, best first


@dataclass(frozen=True)
class CocoTruth:
    """Ground truth of the package, and the ids of the images and captions that were ranked."""

    metrics: Any
    ids: CocoIds


def coco_truth(ids: CocoIds | None, encoded: Encoded) -> tuple[CocoTruth | None, str | None]:
    """The truth where it can be asked, and a line where these are of COCO's test split and it cannot."""
    if ids is None:
        return None, None
    here = "no figures of ECCV Caption and CxC"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about packages that only make it faster
            from eccv_caption import Metrics  # type: ignore[import-untyped,import-not-found]

            metrics: Any = Metrics()
    except ImportError:
        return None, f"{here}: pip install eccv_caption"
    images, captions = set(metrics.coco_gts["i2t"]), set(metrics.coco_gts["t2i"])
    if images.isdisjoint(ids.images.tolist()):
        return None, None  # another split
    missing = len(images - set(ids.images.tolist())), len(captions - set(ids.captions.tolist()))
    if any(missing):
        return None, f"{here}: {missing[0]} images and {missing[1]} captions of COCO's test split are not in this set"
    if (len(ids.images), len(ids.captions)) != (len(encoded.keys), len(encoded.captions)):
        return None, f"{here}: some images could not be read"
    return CocoTruth(metrics, ids), None


def coco_figures(
    truth: CocoTruth,
    encoded: Encoded,
    first: tuple[Ranked, Ranked],
    second: tuple[Ranked, Ranked] | None,
    reranked: int,
) -> Figures:
    """Compute COCO's metrics of both directions, {name: (value, chance)}; every rank calls it.

    Names: eccv_*_mAP@R, _R-precision and _R@1, cxc_*_R@k, coco_1k_*_R@k; those of the second order with the prefix
    reranked_. first, second: text to image, image to text, at least `DEPTH` deep. reranked: how many candidates of each
    query the second order moved.
    """
    folds = _fold_lists(truth, encoded)
    table: Figures = {}
    for prefix, ranked, moved in (("", first, 0), ("reranked_", second, reranked)):
        if ranked is None:
            continue
        lists = _lists(truth, ranked)
        within = folds if not moved else _moved_within_folds(truth, ranked, folds, moved)
        table |= {prefix + name: pair for name, pair in broadcast_object(_asked(truth, lists, within)).items()}
    return table


def _asked(truth: CocoTruth, lists: Mapping[str, _Lists], within: Mapping[str, _Lists]) -> Figures:
    """Compute the package's metrics on the first rank; other ranks return nothing."""
    if rank() != 0:
        return {}
    metrics = truth.metrics
    with contextlib.redirect_stderr(io.StringIO()):  # one of its functions draws a bar whatever it is told
        eccv = metrics.eccv_metrics(lists, "all")
        cxc = {k: metrics.cxc_recalls(lists, "all", K=k) for k in KS}
        one_k = {k: metrics.coco_1k_recalls(within, "all", K=k) for k in KS}
    table: Figures = {}
    for direction, short in _DIRECTIONS.items():
        total = len(metrics.coco_gts["t2i" if short == "i2t" else "i2t"])
        known, verified = metrics.eccv_gts[short], metrics.cxc_gts[short]
        candidates = set(metrics.coco_gts["t2i" if short == "i2t" else "i2t"])
        counts, there = np.array([(len(set(v)), len(candidates.intersection(v))) for v in known.values()]).T
        by_chance = _chance_at_r(counts, there, total)
        for name, key, chance in (
            ("mAP@R", "eccv_map_at_r", by_chance[0]),
            ("R-precision", "eccv_rprecision", by_chance[1]),
            ("R@1", "eccv_r1", float((there / total).mean())),
        ):
            table[f"eccv_{direction}_{name}"] = float(eccv[key][short]), chance
        chances = chance_recall(np.array([len(set(v)) for v in verified.values()]), total, KS)
        of_fold = chance_recall(np.array([len(v) for v in metrics.coco_gts[short].values()]), total // _FOLDS, KS)
        table |= {f"cxc_{direction}_R@{k}": (float(cxc[k][short]), chances[k]) for k in KS}
        table |= {f"coco_1k_{direction}_R@{k}": (float(one_k[k][short]), of_fold[k]) for k in KS}
    return table


def _chance_at_r(counts: np.ndarray, there: np.ndarray, candidates: int) -> tuple[float, float]:
    """Expected mAP@R and R-precision of a random ranking. counts: R of each query; there: how many of these are among
    the candidates. At place r a right one stands with probability there / candidates, and then (there - 1) /
    (candidates - 1) of the r - 1 before it are right."""
    averages = []
    for r, right in zip(counts, there, strict=True):
        places = np.arange(1, r + 1)
        averages.append(right / candidates * ((1 + (places - 1) * (right - 1) / (candidates - 1)) / places).mean())
    return float(np.mean(averages)), float((there / candidates).mean())


def _lists(truth: CocoTruth, ranked: tuple[Ranked, Ranked]) -> dict[str, _Lists]:
    """Return the ranked COCO ids of each query, for both directions.

    Captions that the package does not know are left out; the split has a few (images with more than five).
    """
    ids, known = truth.ids, np.array(list(truth.metrics.coco_gts["t2i"]))
    listed = np.isin(ids.captions, known)
    to_text = (order[listed[order]] for order in ranked[1].top[:, :DEPTH])
    return {
        "t2i": dict(zip(ids.captions.tolist(), ids.images[ranked[0].top[:, :DEPTH]].tolist(), strict=True)),
        "i2t": dict(zip(ids.images.tolist(), (ids.captions[order].tolist() for order in to_text), strict=True)),
    }


def _fold_lists(truth: CocoTruth, encoded: Encoded) -> dict[str, _Lists]:
    """Rank each query's candidates within its own fold: lists cut at some depth need not hold one."""
    ids, table = truth.ids, {"t2i": _Lists(), "i2t": _Lists()}
    deepest = max(KS)
    for images, captions in _folds(truth):
        text, image = encoded.text[captions], encoded.image[images]
        to_image = ids.images[images][rank_candidates(text, image, {}, deepest).top]
        to_text = ids.captions[captions][rank_candidates(image, text, {}, deepest).top]
        table["t2i"] |= dict(zip(ids.captions[captions].tolist(), to_image.tolist(), strict=True))
        table["i2t"] |= dict(zip(ids.images[images].tolist(), to_text.tolist(), strict=True))
    return table


def _moved_within_folds(
    truth: CocoTruth, second: tuple[Ranked, Ranked], folds: Mapping[str, _Lists], moved: int
) -> dict[str, _Lists]:
    """Return the folds' lists with the re-ranked candidates in front, in their new order."""
    ids, table = truth.ids, {"t2i": _Lists(), "i2t": _Lists()}
    fold_of_image, fold_of_caption = np.full(len(ids.images), -1), np.full(len(ids.captions), -1)
    for fold, (images, captions) in enumerate(_folds(truth)):
        fold_of_image[images], fold_of_caption[captions] = fold, fold
    sides: Sequence[tuple[str, Ranked, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = (
        ("t2i", second[0], ids.captions, fold_of_caption, ids.images, fold_of_image),
        ("i2t", second[1], ids.images, fold_of_image, ids.captions, fold_of_caption),
    )
    for name, ranked, queries, fold_of_query, candidates, fold_of_candidate in sides:
        for query in np.flatnonzero(fold_of_query >= 0):
            top = ranked.top[query, :moved]
            front = candidates[top[fold_of_candidate[top] == fold_of_query[query]]].tolist()
            rest = folds[name][int(queries[query])]
            table[name][int(queries[query])] = [*front, *(each for each in rest if each not in front)]
    return table


def _folds(truth: CocoTruth) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each fold, the ascending indices of its images and of its captions."""
    ids, owners = truth.ids, truth.metrics.coco_gts["t2i"]
    folds = []
    for captions in np.split(truth.metrics.coco_ids, _FOLDS):
        images = [owners[caption][0] for caption in captions.tolist()]
        folds.append((np.flatnonzero(np.isin(ids.images, images)), np.flatnonzero(np.isin(ids.captions, captions))))
    return folds
