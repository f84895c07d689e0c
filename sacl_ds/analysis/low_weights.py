"""Search a whole set, tile by tile and in threads, for the pairs of least weight or greatest similarity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sacl_ds.analysis.pairs import Pairs
from sacl_ds.analysis.threads import in_order
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.losses.weights import Contrast, Region, WeightTile, WeightTiles

TILE = 2048
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Found:
    """Pairs of image `image` and caption `text`, rows of the set, the most suspected first; numpy arrays alike.

    weight_image, weight_text: of the caption for the image as anchor, and of the image for the caption; weight: the
    smaller of both. similarity, teacher_similarity: cosines, the teacher's NaN without one. chosen: how many pairs pass
    the bound; at most the asked number of them is here. pairs: of an image and a caption that are negatives.
    """

    image: np.ndarray
    text: np.ndarray
    weight_image: np.ndarray
    weight_text: np.ndarray
    similarity: np.ndarray
    teacher_similarity: np.ndarray
    chosen: int
    pairs: int

    @property
    def weight(self) -> np.ndarray:
        return np.minimum(self.weight_image, self.weight_text)


@torch.no_grad()
def least_weights(
    pairs: Pairs,
    regulation: Regulation,
    bound: float,
    top: int,
    *,
    by_similarity: bool = False,
    tile: int = TILE,
    done: Callable[[int], None] = lambda tiles: None,
) -> Found:
    """Find the `top` pairs of least weight under `bound`, or by cosine the greatest above it.

    by_similarity: by cosine, the teacher's if there is one. Weights have mean 1 over all negatives of an anchor in the
    set; none is removed. Pairs of rows that share an id are no negatives. done(1) is called after each of `tile_count`
    tiles, one a thread. Raises UserError for a sharpness that leaves the range of numbers.
    """
    image, text, ids = (torch.from_numpy(each) for each in (pairs.image, pairs.text, pairs.pair_ids))
    teacher = None
    if pairs.teacher is not None:
        teacher = torch.from_numpy(pairs.teacher[0]), torch.from_numpy(pairs.teacher[1])
    alpha = 0.0 if teacher is None else regulation.alpha
    regulation = replace(regulation, alpha=alpha, negative_mass=1.0, drop_below=None)

    def run(work: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterator[_Result]:
        for result in in_order(work, items):
            yield result
            done(1)

    try:
        contrast, by_teacher = Contrast.of_batch(image, text, teacher, ids), by_similarity and teacher is not None
        tiles = WeightTiles(contrast, regulation, tile, teacher=by_teacher, fast=True, run=run)
    except ValueError as error:
        raise UserError(str(error)) from None
    limit = -bound if by_similarity else math.log(bound) if bound > 0 else -math.inf
    chosen, kept = 0, torch.empty(0, 6, dtype=torch.float64)

    def search(region: Region) -> tuple[int, Tensor]:
        # what scores above the last one kept, in whichever thread, need not be looked at
        worst = float(kept[-1, 0]) if len(kept) == top else math.inf
        return _candidates(tiles.tile(region), by_similarity, limit, worst, top)

    for passed, new in run(search, tiles.regions):
        chosen += passed
        if len(new):
            kept = _first(torch.cat([kept, new]), top)
    _, rows, columns, of_image, of_text, similarity = kept.numpy().T
    rows, columns = rows.astype(np.int64), columns.astype(np.int64)
    of_teacher = np.full(len(rows), np.nan)
    if pairs.teacher is not None:
        a, b = pairs.teacher[0][rows], pairs.teacher[1][columns]
        of_teacher = (a.astype(np.float64) * b).sum(1)
    negatives = int(tiles.negatives[0].sum())
    return Found(rows, columns, np.exp(of_image), np.exp(of_text), similarity, of_teacher, chosen, negatives)


def tile_count(pairs: int, tile: int = TILE) -> int:
    """Return the number of tiles in both passes over the pairs."""
    return 2 * math.ceil(pairs / tile) ** 2


def _candidates(tile: WeightTile, by_similarity: bool, limit: float, worst: float, top: int) -> tuple[int, Tensor]:
    """Count the tile's pairs that score under `limit`, and list the `top` lowest that score at most `worst`.

    Returns the list as (m, 6): score, image, text, two log weights, cosine.
    """
    by_image, by_text = tile.log_weight(0), tile.log_weight(1)
    if by_similarity:
        score = -(tile.cosine if tile.teacher_cosine is None else tile.teacher_cosine)
    else:
        score = torch.minimum(by_image, by_text)
    tile.excluded.fill(score, torch.inf)
    passes = score < limit
    passed = int(passes.sum())
    if worst < limit:
        passes &= score <= worst
    row, column = passes.nonzero().unbind(1)
    if len(row) > top:
        best = score[row, column].topk(top, largest=False).indices
        row, column = row[best], column[best]
    values = [score, row + tile.rows.start, column + tile.columns.start, by_image, by_text, tile.cosine]
    return passed, torch.stack([(x[row, column] if x.ndim == 2 else x).double() for x in values], 1)


def _first(rows: Tensor, count: int) -> Tensor:
    """The `count` rows of least score, ties by position."""
    values = rows.numpy()
    return rows[torch.from_numpy(np.lexsort((values[:, 2], values[:, 1], values[:, 0]))[:count])]
