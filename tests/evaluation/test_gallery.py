"""The gallery shows the right images in their order, frames those that are right, and picks texts that tell most."""

from pathlib import Path

import numpy as np
import pytest
import retrieving
from PIL import Image

from sacl_ds.errors import UserError
from sacl_ds.evaluation.ranking import Listed, Ranking
from sacl_ds.evaluation.retrieval import evaluate_retrieval
from sacl_ds.evaluation.rounds import pictures_of
from sacl_ds.tasks.retrieval.task import TOP, draw_gallery, telling
from sacl_ds.telemetry.sheet import MARKED

IMAGES, TEXTS = 12, 24
COLOURS = [(20 * i, 200 - 15 * i, 90) for i in range(IMAGES)]


def listed(orders: list[list[int]]) -> Listed:
    order = np.array(orders)
    return Listed(order, order == np.arange(TEXTS)[:, None] // 2)


def ranking(moved: dict[int, list[int]]) -> Ranking:
    """Text t is of image t // 2 and finds the images in order; `moved` says what re-ranking makes of some texts."""
    usual = list(range(10))
    return Ranking(
        numbers=np.arange(IMAGES) + 100,  # as where the first hundred cannot be read
        keys=[f"image {i}" for i in range(IMAGES)],
        captions=[f"text number {t}" for t in range(TEXTS)],
        owner=np.arange(TEXTS) // 2,
        text_to_image=listed([usual] * TEXTS),
        image_to_text=Listed(np.zeros((IMAGES, 10), int), np.zeros((IMAGES, 10), bool)),
        reranked_text_to_image=listed([moved.get(t, usual) for t in range(TEXTS)]) if moved else None,
    )


UP, DOWN = [9, *range(9)], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
MOVED = {19: UP, 0: DOWN, 18: UP, 6: [3, 0, 1, 2, *range(4, 10)]}  # 9 places up, 9 down, 9 up, 3 up


def test_texts_that_move_most() -> None:
    assert telling(ranking(MOVED), 2) == [18, 0]
    assert telling(ranking(MOVED), 3) == [18, 0, 6]  # 19 is of the image that 18 has shown
    assert len(telling(ranking(MOVED), 99)) == IMAGES
    assert telling(ranking({}), 2) == [18, 16]  # no second stage: found, but late; images 10 and 11 are not found


def test_no_words_are_shown_twice() -> None:
    """Of two images with the same caption the one that re-ranking moves further."""
    made = ranking({19: UP, 0: DOWN, 4: [2, 0, 1, *range(3, 10)]})
    assert telling(made, 3) == [19, 0, 4]
    made.captions[4] = made.captions[19]
    assert telling(made, 3) == [19, 0, 2]  # the first of those that did not move
    made.captions[:] = ["one caption"] * TEXTS
    assert telling(made, 3) == [19]


@pytest.mark.parametrize("moved", [MOVED, {}], ids=["both stages", "first stage"])
def test_pictures_stand_in_their_order(moved: dict[int, list[int]], tmp_path: Path) -> None:
    asked: list[int] = []

    def pictures(numbers):  # type: ignore[no-untyped-def]
        asked.extend(numbers)
        return {n: Image.new("RGB", (60, 40), COLOURS[n - 100]) for n in numbers if n != 103}

    made, texts = ranking(moved), [6, 18]
    assert draw_gallery(made, pictures, tmp_path / "new/g.png", texts) == texts
    rows = [made.text_to_image.order[t] for t in texts]
    if made.reranked_text_to_image is not None:
        rows = [each for t in texts for each in (made.text_to_image.order[t], made.reranked_text_to_image.order[t])]
    assert asked == sorted({100 + int(place) for row in rows for place in row[:TOP]})
    sheet = np.array(Image.open(tmp_path / "new/g.png").convert("RGB")).astype(int)
    frame = tuple(int(MARKED[i : i + 2], 16) for i in (1, 3, 5))
    found, framed = [], []
    height = sheet.shape[0] // len(rows)
    for number in range(len(rows)):
        strip = sheet[number * height : (number + 1) * height]
        for column in range(TOP):
            tile = strip[:, 10 + 200 * column : 200 + 200 * column]
            counts = [(np.abs(tile - colour).sum(2) == 0).sum() for colour in COLOURS]
            found.append(int(np.argmax(counts)) if max(counts) > 1000 else 3)  # one of them cannot be read
            framed.append(bool((np.abs(tile - frame).sum(2) == 0).sum() > 500))
    assert found == [int(place) for row in rows for place in row[:TOP]]
    per_text = len(rows) // len(texts)
    assert framed == [place == texts[i // per_text] // 2 for i, row in enumerate(rows) for place in row[:TOP]]
    assert any(framed)


def test_of_a_model(tmp_path: Path) -> None:
    view, data = retrieving.view(), retrieving.scenes(8)
    result = evaluate_retrieval(retrieving.model(view), data, view, retrieving.CPU, 8, rerank=4)
    texts = draw_gallery(result.ranking, lambda numbers: pictures_of(data, numbers), tmp_path / "g.png", count=2)
    assert len({result.ranking.owner[text] for text in texts}) == 2
    assert Image.open(tmp_path / "g.png").width > 900


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no text 24 to draw; there are 0 to 23"):
        draw_gallery(ranking({}), lambda numbers: {}, tmp_path / "g.png", [3, 24])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/g\.png cannot be written: "):
        draw_gallery(ranking({}), lambda numbers: {}, tmp_path / "file/g.png", [3])
