"""The pairs of least weight, or of most similarity, of a whole set: tile by tile, in two passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sacl_ds.analysis.pairs import Pairs
from sacl_ds.analysis.threads import in_order
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation

TILE = 2048
_STEEP, _STEEPEST = 80.0, 600.0  # e^this times the number of pairs stays within float32, and within float64


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
    """The `top` pairs of least weight under `bound`; by_similarity: of the largest cosine above it, the teacher's where
    there is one.

    Weights have mean 1 over all negatives of an anchor in the set. Pairs of rows that share an id are no negatives.
    done(1) is called after each of `tile_count` tiles, one a thread. Raises UserError for a sharpness that leaves the
    range of numbers.
    """
    tiles, n = _Tiles(pairs, regulation, tile), len(pairs)
    sums = torch.zeros(2, n, dtype=torch.float64)
    counts = torch.full((2, n), float(n), dtype=torch.float64)
    for rows, columns, of_rows, of_columns, (row, column) in in_order(tiles.sums, tiles.places()):
        sums[0, rows] += of_rows
        sums[1, columns] += of_columns
        for direction, (where, left_out) in enumerate(((rows, row), (columns, column))):
            counts[direction, where] -= torch.bincount(left_out, minlength=where.stop - where.start)
        done(1)
    factors = torch.where(sums > 0, counts / sums, 0.0)  # weight = inverse * factor of the anchor
    chosen = 0
    search = _Search(tiles, factors, -bound if by_similarity else bound, top, by_similarity)
    kept = search.kept
    for passed, new in in_order(search.tile, tiles.places()):
        chosen += passed
        if len(new):
            kept = search.kept = _first(torch.cat([kept, new]), top)
        done(1)
    _, image, text, weight_image, weight_text, similarity, teacher_similarity = kept.numpy().T
    return Found(
        image.astype(np.int64),
        text.astype(np.int64),
        weight_image,
        weight_text,
        similarity,
        teacher_similarity,
        chosen,
        pairs=int(counts[0].sum()),
    )


def tile_count(pairs: int, tile: int = TILE) -> int:
    """Of both passes."""
    return 2 * math.ceil(pairs / tile) ** 2


Place = tuple[slice, slice]  # images, captions
Excluded = tuple[Tensor, Tensor]  # rows and columns of a tile


class _Tiles:
    """Tiles of images x captions. Row and column of an excluded pair count from the tile's own corner."""

    def __init__(self, pairs: Pairs, regulation: Regulation, size: int) -> None:
        if regulation.steepness > _STEEPEST:
            steep = regulation.steepness
            raise UserError(f"a sharpness of {steep:g} leaves the range of numbers; take one up to {_STEEPEST:g}")
        self.pairs, self.regulation, self.size = pairs, regulation, size
        self.dtype = torch.float32 if regulation.steepness <= _STEEP else torch.float64
        self._recurs = [_recurring(column) for column in pairs.pair_ids.T]

    def places(self) -> Iterator[Place]:
        n, size = len(self.pairs), self.size
        parts = [slice(start, min(n, start + size)) for start in range(0, n, size)]
        return ((rows, columns) for rows in parts for columns in parts)

    def sums(self, place: Place) -> tuple[slice, slice, Tensor, Tensor, Excluded]:
        """Sums of 1/s over the negatives in this tile, of its images and of its captions."""
        _, _, inverse, excluded = self.inverse(place)
        return *place, inverse.sum(1).double(), inverse.sum(0).double(), excluded

    def inverse(self, place: Place) -> tuple[Tensor, Tensor | None, Tensor, Excluded]:
        """Cosines, the teacher's, 1/s with 0 where two are no negatives of each other, and which are not."""
        pairs, (rows, columns) = self.pairs, place
        cosine = _tensor(pairs.image[rows]) @ _tensor(pairs.text[columns]).T
        theirs = None
        if pairs.teacher is not None:
            theirs = _tensor(pairs.teacher[0][rows]) @ _tensor(pairs.teacher[1][columns]).T
        inverse = self._similarity(
            cosine.to(self.dtype), None if theirs is None else theirs.to(self.dtype)
        ).reciprocal_()
        excluded = self._excluded(place)
        inverse[excluded] = 0.0
        return cosine, theirs, inverse, excluded

    def _similarity(self, cosine: Tensor, theirs: Tensor | None) -> Tensor:
        """s itself: within the range of numbers, two exponentials are less than the logarithm of their sum."""
        regulation = self.regulation
        if regulation.even:
            return torch.ones_like(cosine)
        if theirs is None or regulation.alpha == 0:
            return (regulation.sharpness * cosine).exp_()
        similarity = (regulation.teacher_sharpness * theirs).exp_()
        if regulation.alpha == 1:
            return similarity
        return similarity.mul_(regulation.alpha).add_(
            (regulation.sharpness * cosine).exp_(), alpha=1 - regulation.alpha
        )

    def _excluded(self, place: Place) -> Excluded:
        """Few pairs share an id: only rows and columns with an id that occurs twice are compared."""
        rows, columns = place
        width = columns.stop - columns.start
        found = [np.arange(width) * (width + 1) if rows == columns else np.zeros(0, np.int64)]
        for ids, recurs in zip(self.pairs.pair_ids.T, self._recurs, strict=True):
            mine, other = (np.flatnonzero(recurs[part]) for part in place)
            a, b = np.nonzero(ids[rows][mine][:, None] == ids[columns][other][None])
            found.append(mine[a] * width + other[b])
        flat = torch.from_numpy(np.unique(np.concatenate(found)))
        return flat // width, flat % width


class _Search:
    """Candidates of one tile: (how many pass the bound, (m, 7) score, image, text, two weights, two cosines)."""

    def __init__(self, tiles: _Tiles, factors: Tensor, limit: float, top: int, by_similarity: bool) -> None:
        self.tiles, self.factors, self.limit = tiles, factors, limit
        self.top, self.by_similarity = top, by_similarity
        self.kept = torch.empty(0, 7, dtype=torch.float64)  # so far; what scores above its last is not looked at

    def tile(self, place: Place) -> tuple[int, Tensor]:
        cosine, theirs, inverse, excluded = self.tiles.inverse(place)
        of_image, of_text = self.factors[0, place[0]], self.factors[1, place[1]]
        if self.by_similarity:
            score = -(cosine if theirs is None else theirs)
        else:
            score = torch.minimum(of_image.to(inverse.dtype)[:, None], of_text.to(inverse.dtype)).mul_(inverse)
        score[excluded] = torch.inf
        passes, kept = score < self.limit, self.kept
        passed = int(passes.sum())
        if len(kept) == self.top:
            passes &= score <= kept[-1, 0].to(score.dtype)
        row, column = passes.nonzero().unbind(1)
        if len(row) > self.top:
            best = score[row, column].topk(self.top, largest=False).indices
            row, column = row[best], column[best]
        value, inverses = score[row, column].double(), inverse[row, column].double()
        teacher = torch.full_like(value, torch.nan) if theirs is None else theirs[row, column].double()
        first_image, first_text = (part.start for part in place)
        return passed, torch.stack(
            [
                value, (row + first_image).double(), (column + first_text).double(), inverses * of_image[row],
                inverses * of_text[column], cosine[row, column].double(), teacher,
            ],
            1,
        )  # fmt: skip


def _recurring(ids: np.ndarray) -> np.ndarray:
    """(n,) bool: whether another row has the same id."""
    _, place, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return counts[place] > 1


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _first(rows: Tensor, count: int) -> Tensor:
    """The `count` rows of least score, ties by position."""
    values = rows.numpy()
    return rows[torch.from_numpy(np.lexsort((values[:, 2], values[:, 1], values[:, 0]))[:count])]
