"""Retrieval: both stages against brute force, figures against metrics of the whole matrix, and what cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest
import retrieving
import sources
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sacl_ds.errors import UserError
from sacl_ds.evaluation import first_stage
from sacl_ds.evaluation.encoding import encode
from sacl_ds.evaluation.first_stage import best, mean_precisions, rank_candidates
from sacl_ds.evaluation.metrics import mean_average_precision, recall_at_k
from sacl_ds.evaluation.rerank import match_scores, reordered
from sacl_ds.evaluation.retrieval import evaluate_retrieval
from sacl_ds.evaluation.rounds import ImageRounds, pictures_of
from sacl_ds.tasks.retrieval.task import karpathy_images, retrieval_set

VIEW = retrieving.view()
numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.25, 1e-30, -1e-30, float("nan"), float("-inf"), float("inf")])


@given(st.integers(1, 12).flatmap(lambda m: st.lists(st.lists(numbers, min_size=m, max_size=m), min_size=1)), st.data())
@settings(max_examples=200, deadline=None)
def test_the_best_are_those_of_a_stable_sort(rows: list[list[float]], data: st.DataObject) -> None:
    scores = np.array(rows, np.float32)
    k = data.draw(st.integers(1, scores.shape[1]))
    last = [[-np.inf if np.isnan(x) else x for x in row] for row in scores]
    expected = [sorted(range(len(row)), key=lambda j, row=row: -row[j])[:k] for row in last]
    np.testing.assert_array_equal(best(scores, k), expected)


def worst_place(scores: np.ndarray, relevant: np.ndarray) -> int | None:
    """Of the first relevant candidate where irrelevant ones stand first among equals."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], relevant[j]))
    return next((place for place, j in enumerate(order) if relevant[j]), None)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_both_stages_are_brute_force(q: int, m: int, seed: int, at_once: int) -> None:
    """With ties in both, queries without a relevant candidate, and chunks of any size."""
    rng = np.random.default_rng(seed)
    queries, candidates = (rng.integers(-1, 2, (rows, 3)).astype(np.float32) for rows in (q, m))
    relevance, k = rng.random((q, m)) < 0.3, int(rng.integers(1, m + 1))
    second = rng.integers(0, 3, (q, m)).astype(np.float32)
    scores = queries @ candidates.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_stage, "_SCORES_AT_ONCE", at_once)
        ranked = rank_candidates(queries, candidates, {"own": lambda rows: relevance[rows]}, m)
        listed = np.take_along_axis(second, ranked.top[:, :k], 1)
        moved = reordered(ranked, listed)
        reranked = mean_precisions(queries, candidates, lambda rows: relevance[rows], (ranked.top[:, :k], listed))
    np.testing.assert_array_equal(ranked.top, retrieving.full_order(scores))
    np.testing.assert_array_equal(moved.top, retrieving.full_order(scores, second, k))
    np.testing.assert_array_equal(moved.hits["own"], np.take_along_axis(relevance, moved.top, 1))
    for row in range(q):
        place = worst_place(scores[row], relevance[row])
        assert (ranked.places["own"][row] >= m) if place is None else (ranked.places["own"][row] == place)
        # the list of the first stage in front, by the second score; what is not in it as it was
        whole = np.where(np.isin(np.arange(m), ranked.top[row, :k]), 10 + second[row], scores[row])
        place = worst_place(whole, relevance[row])
        assert (moved.places["own"][row] >= m) if place is None else (moved.places["own"][row] == place)
        if place is None:
            assert np.isnan(reranked[row])
        else:
            assert reranked[row] == pytest.approx(mean_average_precision(whole[None], relevance[row][None]))


def test_re_ranking_by_hand() -> None:
    queries, candidates = np.array([[1.0]], np.float32), np.array([[0.9], [0.8], [0.7], [0.1]], np.float32)
    for relevant, scores, order, place in (
        ([0, 0, 1, 0], [0.1, 0.2, 0.3], [2, 1, 0, 3], 0),
        ([0, 0, 1, 0], [0.1, np.nan, np.nan], [0, 1, 2, 3], 2),  # NaN last, and no help
        ([0, 0, 0, 1], [0.1, 0.2, 0.3], [2, 1, 0, 3], 3),  # not among the candidates: as it was
        ([1, 0, 0, 0], [0.2, 0.2, 0.1], [0, 1, 2, 3], 1),  # a tie does not help
    ):
        table = np.array([relevant], bool)
        ranked = rank_candidates(queries, candidates, {"own": lambda rows, table=table: table[rows]}, 4)
        moved = reordered(ranked, np.array([scores], np.float32))
        assert (moved.top[0].tolist(), moved.places["own"].tolist()) == (order, [place])


def test_figures_are_those_of_the_whole_matrix() -> None:
    model = retrieving.model(VIEW).train()
    result = evaluate_retrieval(model, retrieving.scenes(), VIEW, retrieving.CPU, 8, rerank=6)
    assert model.training
    model.eval()
    cosines, matches = retrieving.by_hand(model, VIEW, 37)
    own, holds = np.kron(np.eye(37, dtype=bool), np.ones((4, 1), bool)), retrieving.scenes().satisfying
    assert holds is not None

    def lifted(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Scores whose order is that after re-ranking."""
        listed = np.zeros(first.shape, bool)
        np.put_along_axis(listed, retrieving.full_order(first)[:, :6], True, 1)
        return np.where(listed, second + 1000, first)

    for prefix, by_text, by_image in (
        ("", cosines, cosines.T), ("reranked_", lifted(cosines, matches), lifted(cosines.T, matches.T))
    ):  # fmt: skip
        values = {name.removeprefix(prefix): v for name, (v, _) in result.figures.items() if name.startswith(prefix)}
        texts, images = recall_at_k(by_text, own, (1, 5, 10)), recall_at_k(by_image, own.T, (1, 5, 10))
        assert {k: values[f"text_to_image_R@{k}"] for k in texts} == pytest.approx(texts)
        assert {k: values[f"image_to_text_R@{k}"] for k in images} == pytest.approx(images)
        assert values["mean_recall"] == pytest.approx(np.mean([*texts.values(), *images.values()]))
        assert values["text_to_image_any_R@1"] == pytest.approx(recall_at_k(by_text, holds, (1,))[1])
        assert values["image_to_text_any_R@1"] == pytest.approx(recall_at_k(by_image, holds.T, (1,))[1])
        assert values["text_to_image_mAP"] == pytest.approx(mean_average_precision(by_text, holds))
    assert len(result.figures) == 20
    assert result.notes == []
    ranking, expected = result.ranking, retrieving.full_order(cosines, matches, 6)[:, :10]
    assert ranking.reranked_text_to_image is not None
    np.testing.assert_array_equal(ranking.reranked_text_to_image.order, expected)
    np.testing.assert_array_equal(ranking.reranked_text_to_image.right, np.take_along_axis(holds, expected, 1))
    np.testing.assert_array_equal(ranking.image_to_text.order, retrieving.full_order(cosines.T)[:, :10])
    lines = list(ranking.lines())
    assert len(lines) == 5 * 37
    assert lines[5]["query"] == retrieving.SCENES[1].captions[1]
    assert [each["candidate"] for each in lines[5]["reranked"]] == [retrieving.SCENES.key(j) for j in expected[5]]
    assert lines[4 * 37]["own"] == retrieving.SCENES[0].captions


PLACEMENTS = [
    {},
    {"placement": "output", "keep_rate": 0.5},
    {"placement": "tower", "keep_rate": 0.5, "layers": [1]},
    {"placement": "tower", "keep_rate": 0.5, "layers": [1], "guide": "cls"},
    {"placement": "published", "keep_rate": 0.5, "layers": [1]},
]


@pytest.mark.parametrize("selection", PLACEMENTS, ids=lambda s: " ".join(map(str, s.values())) or "none")
def test_scores_are_those_of_a_double_loop(selection: dict[str, object]) -> None:
    """Each pair alone, without padding, beside the pairs of both directions in chunks."""
    model, data = retrieving.model(VIEW, selection), retrieving.scenes(11)
    with torch.no_grad():
        encoded = encode(model, data, VIEW, retrieving.CPU, 4, True, lambda *_: None)
        ranked = (
            rank_candidates(encoded.text, encoded.image, {}, 3),
            rank_candidates(encoded.image, encoded.text, {}, 5),
        )
        told: list[tuple[str, int, int]] = []
        candidates = ranked[0].top, ranked[1].top
        pairs = match_scores(model, data, VIEW, retrieving.CPU, encoded, candidates, 4, lambda *x: told.append(x))
    cosines, matches = retrieving.by_hand(model, VIEW, 11)
    np.testing.assert_allclose(encoded.text @ encoded.image.T, cosines, atol=1e-6)
    wanted = {(text, int(image)) for text in range(44) for image in ranked[0].top[text]}
    wanted |= {(int(text), image) for image in range(11) for text in ranked[1].top[image]}
    assert {(int(key % 44), int(key // 44)) for key in pairs.keys} == wanted
    assert told[-1] == ("re-ranking", len(wanted), len(wanted))
    texts, images = np.array(sorted(wanted)).T
    np.testing.assert_allclose(pairs.of(images, texts), matches[texts, images], rtol=1e-5, atol=1e-5)
    assert matches.std() > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_second_order_is_that_of_match_and_similarity(share: float) -> None:
    """All candidates re-ranked, beside a sort of the whole matrices."""
    model, data = retrieving.model(VIEW), retrieving.scenes(11)
    cosines, matches = retrieving.by_hand(model, VIEW, 11)
    total = matches + share * float(model.logit_scale()) * cosines
    result = evaluate_retrieval(model, data, VIEW, retrieving.CPU, 4, rerank=44, similarity=share)
    assert result.ranking.reranked_text_to_image is not None
    wanted = np.argsort(-total, axis=1)[:, :10]
    assert (result.ranking.reranked_text_to_image.order == wanted).all()
    assert (np.argsort(-matches, axis=1)[:, :10] == wanted).all() == (share == 0)


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    images = karpathy_images(retrieving.karpathy(tmp_path, 9), tmp_path / "images", "test")
    seen = retrieving.view([caption for image in images for caption in image.captions])
    model = retrieving.model(seen)
    (tmp_path / "images/val2014/2.png").unlink()
    whole = (tmp_path / "images/val2014/5.png").read_bytes()
    (tmp_path / "images/val2014/5.png").write_bytes(whole[: len(whole) // 2])

    def result(chosen, share: float = 0.3):  # type: ignore[no-untyped-def]
        return evaluate_retrieval(model, retrieval_set(chosen, share), seen, retrieving.CPU, 4, rerank=3)

    found, kept = result(images), [image for i, image in enumerate(images) if i not in (2, 5)]
    alone = result(kept)
    assert found.figures == alone.figures
    assert found.ranking.captions == alone.ranking.captions == [c for image in kept for c in image.captions]
    assert found.ranking.numbers.tolist() == [0, 1, 3, 4, 6, 7, 8]
    (note,) = found.notes
    assert note.startswith("2 of 9 examples cannot be used: image val2014/2.png: no file ")
    assert "val2014/5.png cannot be read: image file is truncated" in note
    with pytest.raises(UserError, match=r"2 of 9 .*more than data\.max_bad_share=0\.1"):
        result(images, 0.1)
    with pytest.raises(UserError, match=r"none of 2 images can be read with a caption: image val2014/2\.png"):
        result([images[2], images[5]], 1.0)
    with pytest.raises(UserError, match=r"2 of 9 images .*2\.png: no file .*must be the same everywhere"):
        evaluate_retrieval(model, retrieval_set(images, 0.0, ""), seen, retrieving.CPU, 4)
    data = retrieval_set(images, 0.3)
    assert sorted(pictures_of(data, [3, 5, 2, 1, 3])) == [1, 3]
    assert pictures_of(data, [3])[3].size == (39, 40)


def test_an_image_that_goes_away_in_between(tmp_path: Path) -> None:
    images = karpathy_images(retrieving.karpathy(tmp_path, 5), tmp_path / "images", "test")
    seen = retrieving.view([caption for image in images for caption in image.captions])

    def progress(stage: str, count: int, total: int) -> None:
        if stage.startswith("ranking"):
            (tmp_path / "images/val2014/3.png").unlink(missing_ok=True)

    with pytest.raises(UserError, match=r"image val2014/3\.png: no file .*do not change the images"):
        evaluate_retrieval(
            retrieving.model(seen), retrieval_set(images, 1.0), seen, retrieving.CPU, 2, rerank=2, done=progress
        )


def test_only_two_rounds_are_read_at_a_time(tmp_path: Path) -> None:
    """Files that lie further on may still be missing when the first round is used."""
    images = karpathy_images(retrieving.karpathy(tmp_path, 9), tmp_path / "images", "test")
    (tmp_path / "images/val2014/7.png").rename(tmp_path / "later.png")
    rounds = ImageRounds(retrieval_set(images, 1.0), VIEW, 2)
    parts = []
    for part in rounds:
        if not parts:
            (tmp_path / "later.png").rename(tmp_path / "images/val2014/7.png")
        parts.append([each.number for each in part])
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert len(rounds) == 5


def test_sets_that_are_none() -> None:
    data = retrieving.scenes(5)
    for count in (0, 38):
        with pytest.raises(ValueError, match=f"count={count} of a source of 37"):
            type(data)(data.source, count)
    wrong = type(data)(data.source, 5, np.ones((3, 5), bool))
    with pytest.raises(ValueError, match="need bool of the 20 captions and 5 images"):
        evaluate_retrieval(retrieving.model(VIEW), wrong, VIEW, retrieving.CPU, 4)


def test_the_benchmark(tmp_path: Path) -> None:
    asked = ["--images", "60", "--captions", "300", "--dim", "16", "--k-images", "100", "--out", tmp_path / "b.json"]
    done = sources.run("benchmark_retrieval", *asked)
    assert done.returncode == 0, done.stderr
    assert "60 images, 300 captions, 16 dimensions" in done.stdout
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["bytes_peak"] > 10**7
    assert 0 < written["recall"]["text_to_image"]["1"] < written["recall"]["text_to_image"]["10"] <= 1
    assert sources.error_of(sources.run("benchmark_retrieval", "--dim", "0")) == "error: --dim 0: at least 1"
