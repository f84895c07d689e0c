"""Figures of ECCV Caption, CxC and COCO 1K are those of the package, called directly with whole sorted lists."""

import sys
from typing import Any

import numpy as np
import pytest
import retrieving

from sacl_ds.evaluation.coco import CocoTruth, coco_figures, coco_truth
from sacl_ds.evaluation.encoding import Encoded
from sacl_ds.evaluation.first_stage import rank_candidates
from sacl_ds.evaluation.rerank import reordered
from sacl_ds.evaluation.retrieval import evaluate_retrieval
from sacl_ds.evaluation.rounds import CocoIds

DEPTH, MOVED = 64, 30
STRANGERS = 3  # captions of the set that the package does not know, as the split has ten


def smaller(per_fold: int) -> Any:
    """The package's truth of the first images of each of its folds, and nothing else."""
    metrics = pytest.importorskip("eccv_caption").Metrics()
    captions: list[int] = []
    for fold in np.split(metrics.coco_ids, 5):
        images = list(dict.fromkeys(metrics.coco_gts["t2i"][caption][0] for caption in fold.tolist()))[:per_fold]
        captions += [caption for caption in fold.tolist() if metrics.coco_gts["t2i"][caption][0] in images]
    images = {metrics.coco_gts["t2i"][caption][0] for caption in captions}
    for name in ("coco_gts", "cxc_gts", "eccv_gts"):
        table = getattr(metrics, name)
        left = {
            "t2i": {key: kept for key in table["t2i"] if key in captions
                    and (kept := [image for image in table["t2i"][key] if image in images])},
            "i2t": {key: kept for key in table["i2t"] if key in images
                    and (kept := [caption for caption in table["i2t"][key] if caption in captions])},
        }  # fmt: skip
        setattr(metrics, name, left)
    metrics.coco_ids = np.array(captions)
    return metrics


def drawn(metrics: Any, dim: int = 32) -> tuple[CocoIds, Encoded]:
    """In an order of our own: captions lie near their image and near all images that are verified."""
    rng = np.random.default_rng(0)
    images = rng.permutation(list(metrics.coco_gts["i2t"]))
    known = [(place, caption) for place, image in enumerate(images) for caption in metrics.coco_gts["i2t"][int(image)]]
    known = sorted([*known, *((place, 10**7 + place) for place in range(STRANGERS))])
    owner, captions = np.array(known).T
    image = rng.standard_normal((len(images), dim))
    place_of = {int(cocoid): place for place, cocoid in enumerate(images)}
    text = image[owner] + 1.5 * rng.standard_normal((len(captions), dim))
    for row, caption in enumerate(captions.tolist()):
        for other in metrics.eccv_gts["t2i"].get(caption, []):
            text[row] += 0.5 * image[place_of[other]]
    unit = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text)]
    keys, said = [str(i) for i in images], [str(c) for c in captions]
    return CocoIds(images, captions), Encoded(np.arange(len(images)), keys, said, owner, *unit, None, [])


def assert_as_the_package(metrics: Any, depth: int, whole: Any) -> None:
    ids, encoded = drawn(metrics)
    first = (
        rank_candidates(encoded.text, encoded.image, {}, min(depth, len(ids.images))),
        rank_candidates(encoded.image, encoded.text, {}, min(depth, len(ids.captions))),
    )
    rng = np.random.default_rng(1)
    scores = [rng.standard_normal((len(each.top), MOVED)).astype(np.float32) for each in first]
    second = reordered(first[0], scores[0]), reordered(first[1], scores[1])
    table = coco_figures(CocoTruth(metrics, ids), encoded, first, second, MOVED)
    known = np.array([caption in metrics.coco_gts["t2i"] for caption in ids.captions.tolist()])
    for prefix, moved in (("", None), ("reranked_", scores)):
        lists: dict[str, dict[int, Any]] = {}
        for number, (name, queries, candidates) in enumerate(
            (("t2i", ids.captions, ids.images), ("i2t", ids.images, ids.captions))
        ):
            sides = (encoded.text, encoded.image) if name == "t2i" else (encoded.image, encoded.text)
            orders = np.argsort(-(sides[0] @ sides[1].T), axis=1, kind="stable")
            if moved is not None:
                front = np.argsort(-moved[number], axis=1, kind="stable")
                orders[:, :MOVED] = np.take_along_axis(orders[:, :MOVED], front, 1)
            lists[name] = {
                int(query): whole(candidates[order if name == "t2i" else order[known[order]]])
                for query, order in zip(queries, orders, strict=True)
            }
        eccv = metrics.eccv_metrics(lists, "all")
        cxc = {k: metrics.cxc_recalls(lists, "all", K=k) for k in (1, 5, 10)}
        one_k = {k: metrics.coco_1k_recalls(lists, "all", K=k) for k in (1, 5, 10)}
        expected: dict[str, float] = {}
        for long, short in (("text_to_image", "t2i"), ("image_to_text", "i2t")):
            expected[f"eccv_{long}_mAP@R"] = eccv["eccv_map_at_r"][short]
            expected[f"eccv_{long}_R-precision"] = eccv["eccv_rprecision"][short]
            expected[f"eccv_{long}_R@1"] = eccv["eccv_r1"][short]
            expected |= {f"cxc_{long}_R@{k}": cxc[k][short] for k in cxc}
            expected |= {f"coco_1k_{long}_R@{k}": one_k[k][short] for k in one_k}
        mine = {name: value for name, (value, _) in table.items() if name.startswith("reranked_") == bool(prefix)}
        found = {name.removeprefix(prefix): value for name, value in mine.items()}
        assert found == pytest.approx(expected)
        assert len({round(value, 6) for value in found.values()}) > 8


def test_as_the_package_on_part_of_the_split() -> None:
    metrics = smaller(20)
    assert len(metrics.eccv_gts["i2t"]) > 5
    assert_as_the_package(metrics, DEPTH, lambda order: order.tolist())


@pytest.mark.soak
def test_as_the_package_on_the_whole_split() -> None:
    metrics = pytest.importorskip("eccv_caption").Metrics()
    assert_as_the_package(metrics, DEPTH, lambda order: order.astype(np.int32))  # as lists they would fill 9 GB


def test_chance_is_what_random_features_give() -> None:
    """The figures of rankings without any sense, over twenty draws, are near what stands beside them."""
    metrics = smaller(20)
    ids, encoded = drawn(metrics)
    kept = ids.captions < 10**7
    ids = CocoIds(ids.images, ids.captions[kept])
    rng, tables = np.random.default_rng(2), []
    for _ in range(20):
        image, text = (rng.standard_normal((n, 64)).astype(np.float32) for n in (len(ids.images), len(ids.captions)))
        made = Encoded(encoded.numbers, encoded.keys, ids.captions.tolist(), encoded.owner[kept], image, text, None, [])
        first = rank_candidates(text, image, {}, DEPTH), rank_candidates(image, text, {}, DEPTH)
        tables.append(coco_figures(CocoTruth(metrics, ids), made, first, None, 0))
    for name, (_, chance) in tables[0].items():
        values = [table[name][0] for table in tables]
        assert np.mean(values) == pytest.approx(chance, abs=4 * np.std(values) / 20**0.5 + 1e-3), name
        assert chance > 0


def test_where_it_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = smaller(1)
    ids, encoded = drawn(metrics)
    assert coco_truth(None, encoded) == (None, None)
    truth, note = coco_truth(ids, encoded)
    assert truth is None
    assert note is not None
    assert "4995 images and 24975 captions of COCO's test split are not in this set" in note
    assert coco_truth(CocoIds(ids.images + 10**8, ids.captions), encoded) == (None, None)  # another split
    whole = pytest.importorskip("eccv_caption").Metrics()
    images, captions = np.array(list(whole.coco_gts["i2t"])), np.array(list(whole.coco_gts["t2i"]))
    truth, note = coco_truth(CocoIds(images, captions), encoded)
    assert (truth, note) == (None, "no figures of ECCV Caption and CxC: some images could not be read")
    monkeypatch.setitem(sys.modules, "eccv_caption", None)  # as where it is not installed
    truth, note = coco_truth(ids, encoded)
    assert (truth, note) == (None, "no figures of ECCV Caption and CxC: pip install eccv_caption")


def test_the_evaluation_says_why_there_are_none() -> None:
    view, scenes = retrieving.view(), retrieving.scenes(6)
    metrics = smaller(1)
    ids = CocoIds(np.array(list(metrics.coco_gts["i2t"])[:6]), np.arange(24))
    data = type(scenes)(scenes.source, 6, None, ids)
    result = evaluate_retrieval(retrieving.model(view), data, view, retrieving.CPU, 4)
    (note,) = result.notes
    assert note.startswith("no figures of ECCV Caption and CxC: ")
    assert not any("eccv" in name for name in result.figures)
