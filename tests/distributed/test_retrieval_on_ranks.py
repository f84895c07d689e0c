"""Retrieval on 1, 2 and 3 processes, of sets that do not divide among them: the same figures, scores and passes."""

import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import retrieving
import torch
import torch.distributed as dist
from ranks import on_ranks

from sacl_ds.errors import UserError
from sacl_ds.evaluation.encoding import encode
from sacl_ds.evaluation.first_stage import rank_candidates
from sacl_ds.evaluation.rerank import match_scores
from sacl_ds.evaluation.retrieval import evaluate_retrieval
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.retrieval.task import karpathy_images, retrieval_set

COUNT, BATCH = 10, 3  # 4 + 3 + 3 images on three ranks, so that two of them have a round less
MISSING = (0, 3, 6, 9)  # all of the first of three ranks


def counting(model: SaclModel) -> Counter[str]:
    """How often each part of the model runs, from now on."""
    passes: Counter[str] = Counter()
    for part in ("image_encoder", "text_encoder", "fusion_encoder"):
        getattr(model, part).register_forward_hook(lambda *_, part=part: passes.update([part]))
    return passes


def on_rank(rank: int, folder: Path) -> None:
    seen = retrieving.view()
    found: dict[str, Any] = {}
    for name, selection in (("plain", {}), ("tower", {"placement": "tower", "keep_rate": 0.5, "layers": [1]})):
        model = retrieving.model(seen, selection, torch.float32)
        passes = counting(model)
        data = retrieving.scenes(COUNT)
        result = evaluate_retrieval(model, data, seen, retrieving.CPU, BATCH, rerank=4)
        counted = dict(passes)
        with torch.no_grad():
            encoded = encode(model, data, seen, retrieving.CPU, BATCH, True, lambda *_: None)
            tops = [rank_candidates(*each, {}, 4).top for each in (
                (encoded.text, encoded.image), (encoded.image, encoded.text))]  # fmt: skip
            pairs = match_scores(model, data, seen, retrieving.CPU, encoded, (tops[0], tops[1]), BATCH)
        found[name] = {
            "figures": result.figures, "passes": counted, "image": encoded.image, "text": encoded.text, "tops": tops,
            "keys": pairs.keys, "values": pairs.values, "ranking": result.ranking, "captions": encoded.captions,
        }  # fmt: skip
    images = karpathy_images(folder / "k.json", folder / "images", "test")
    model = retrieving.model(seen, {}, torch.float32)
    part = evaluate_retrieval(model, retrieval_set(images, 0.5), seen, retrieving.CPU, BATCH, rerank=3)
    found["missing"] = {"figures": part.figures, "numbers": part.ranking.numbers, "notes": part.notes}
    try:
        evaluate_retrieval(model, retrieval_set(images, 0.3), seen, retrieving.CPU, BATCH, rerank=3)
        raise AssertionError("too many images are missing")
    except UserError as error:
        found["error"] = str(error)
    (folder / f"{dist.get_world_size()}-{rank}").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("worlds")
    retrieving.karpathy(folder, COUNT)
    for number in MISSING:
        (folder / f"images/val2014/{number}.png").unlink()
    for world in (1, 2, 3):
        on_ranks(world, on_rank, folder)
    return {w: [pickle.loads((folder / f"{w}-{r}").read_bytes()) for r in range(w)] for w in (1, 2, 3)}


def assert_same(a: Any, b: Any, tolerance: float = 0.0) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], tolerance)
    elif hasattr(a, "__dict__"):
        assert_same(vars(a), vars(b), tolerance)
    elif isinstance(a, list) and isinstance(a[0], np.ndarray):
        for mine, other in zip(a, b, strict=True):
            assert_same(mine, other, tolerance)
    elif isinstance(a, np.ndarray) and a.dtype.kind == "f":
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
    else:
        np.testing.assert_array_equal(a, b)


def test_ranks_agree(results: dict[int, list[dict[str, Any]]]) -> None:
    """To the bit within a world, so that none decides otherwise than the others; also in the number of passes."""
    for each in results.values():
        for other in each[1:]:
            assert_same(each[0], other)


@pytest.mark.parametrize("world", [2, 3])
def test_worlds_agree(results: dict[int, list[dict[str, Any]]], world: int) -> None:
    one, several = results[1][0], results[world][0]
    for name in ("plain", "tower"):
        assert_same({**one[name], "passes": 0}, {**several[name], "passes": 0}, 1e-5)
        assert one[name]["image"].shape[0] == COUNT
    assert_same({**one["missing"], "notes": 0}, {**several["missing"], "notes": 0}, 1e-12)


def test_passes_are_those_of_the_longest_part(results: dict[int, list[dict[str, Any]]]) -> None:
    for world, each in results.items():
        found, rounds = each[0]["plain"], math.ceil(math.ceil(COUNT / world) / BATCH)
        captions, pairs = len(found["captions"]), found["keys"]
        numbers = pairs // captions
        fuse = 0
        for turn in range(rounds):
            of_ranks = [
                ((numbers % world == rank) & (numbers // world // BATCH == turn)).sum() for rank in range(world)
            ]
            fuse += max(-(-int(count) // BATCH) for count in of_ranks)
        texts = math.ceil(captions / (BATCH * world))
        expected = {"image_encoder": 2 * rounds, "text_encoder": texts, "fusion_encoder": fuse}
        assert found["passes"] == expected


def test_missing_images(results: dict[int, list[dict[str, Any]]]) -> None:
    for each in results.values():
        missing = each[0]["missing"]
        assert missing["numbers"].tolist() == [1, 2, 4, 5, 7, 8]
        assert missing["notes"][0].startswith("4 of 10 examples cannot be used: image val2014/")
        assert each[0]["error"].endswith("that is more than data.max_bad_share=0.3: put the files there, or raise it")
