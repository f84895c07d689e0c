"""Gallery of texts with the images that a model finds for them, as a picture (paper Fig. 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sacl_ds.errors import UserError
from sacl_ds.evaluation.ranking import Listed, Ranking
from sacl_ds.telemetry.sheet import MARKED, PLAIN, Tile, draw_rows

TOP = 5

Pictures = Callable[[Sequence[int]], Mapping[int, Image.Image]]  # by numbers in the source


def draw_gallery(
    ranking: Ranking, pictures: Pictures, path: Path, texts: Sequence[int] | None = None, count: int = 4
) -> list[int]:
    """Write a PNG of each text's first five images, the right ones framed; below, the re-ranked order if there is one.

    pictures: reads the images of these numbers in the source, without those that cannot be read (`pictures_of`). texts:
    which texts; None: the `count` whose first right image moves most by re-ranking, up or down in turn (`telling`).
    Returns the texts that were drawn. Raises UserError for a text that is not there, or a file that cannot be written.
    """
    chosen = telling(ranking, count) if texts is None else list(texts)
    if unknown := [text for text in chosen if not 0 <= text < len(ranking.captions)]:
        raise UserError(f"{path}: no text {unknown[0]} to draw; there are 0 to {len(ranking.captions) - 1}")
    stages = [("by features", ranking.text_to_image), ("re-ranked", ranking.reranked_text_to_image)]
    drawn = [(name, listed) for name, listed in stages if listed is not None]
    places = {int(place) for _, listed in drawn for text in chosen for place in listed.order[text, :TOP]}
    found = pictures([int(ranking.numbers[place]) for place in sorted(places)])
    rows = []
    for text in chosen:
        for name, listed in drawn:
            tiles = [_tile(ranking, listed, text, rank, found) for rank in range(min(TOP, listed.order.shape[1]))]
            rows.append((f"“{ranking.captions[text]}” · {name}", tiles))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_rows(rows, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return chosen


def telling(ranking: Ranking, count: int) -> list[int]:
    """Texts that show most: those whose first right image re-ranking moves furthest, improved and spoilt in turn.

    Without re-ranking, those whose first right image stands among the first ten, as far behind as possible. At most one
    text of an image, none in the same words twice, and in the order of the texts where nothing tells them apart.
    """
    first, second = ranking.text_to_image, ranking.reranked_text_to_image
    before = _places(first)
    if second is None:
        keys = np.where(before < first.order.shape[1], before, -1)
        orders = [np.argsort(-keys, kind="stable")]
    else:
        gain = before - _places(second)
        orders = [np.argsort(-gain, kind="stable"), np.argsort(gain, kind="stable")]
    chosen: list[int] = []
    shown: set[int | str] = set()
    # which of the orders gives the next one, and where each stands
    queues = [iter(order.tolist()) for order in orders]
    while len(chosen) < count:
        queue = queues[len(chosen) % len(queues)]
        new = (text for text in queue if shown.isdisjoint((int(ranking.owner[text]), ranking.captions[text])))
        text = next(new, None)
        if text is None:
            break
        chosen.append(text)
        shown |= {int(ranking.owner[text]), ranking.captions[text]}
    return chosen


def _places(listed: Listed) -> np.ndarray:
    """Return (q,) ranks of each query's first right candidate, as `Listed.place`."""
    return np.array([listed.place(query) for query in range(len(listed.order))])


def _tile(ranking: Ranking, listed: Listed, text: int, rank: int, found: Mapping[int, Image.Image]) -> Tile:
    place, right = int(listed.order[text, rank]), bool(listed.right[text, rank])
    own = place == ranking.owner[text]
    said = "its own image" if own else "right" if right else ""
    figures = [f"{rank + 1}. {said}".rstrip()]
    picture = found.get(int(ranking.numbers[place]))
    return Tile(picture, (ranking.keys[place],), figures, MARKED if right else PLAIN)
