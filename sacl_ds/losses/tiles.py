"""Tiles of the similarity matrix in plain PyTorch: what a tile adds to the running sums, and to the gradients.

Nothing larger than a tile is ever held. With z_ij = logit_scale * c_ij, r_ij = -log s_ij and x_ij = z_ij + r_ij, the
forward pass needs log-sums of x (`weighted`) and of r (`normaliser`) over the negatives of every row and column, and
the backward pass G_ij = e^(x_ij + a_i) + e^(x_ij + b_j) for a number a_i a row and b_j a column.

One exponential serves rows and columns alike where a tile's exponents lie within HALF_SPAN of one number; what
underflows there is under e^-37 of the sum it belongs to. Elsewhere each direction takes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sacl_ds.losses.regulated import Regulation

TILE = (1024, 1024)  # rows and columns of the largest tile
HALF_SPAN = 50.0
STEEPEST = 25.0  # of HALF_SPAN, what may go to r
_ROWS_AT_ONCE = 4096  # of the products of rows
_SMALLEST_SCALE = 1e-20  # of the logits from which the student's similarity can be had again in float32


def wide(features: Tensor) -> torch.dtype:
    """Dtype of sums over features: float32, or float64 for float64 features."""
    return torch.promote_types(features.dtype, torch.float32)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """(n,) float64: <a_i, b_i> of (n, d) features, in float32 at least."""
    dtype = wide(a)
    parts = zip(a.split(_ROWS_AT_ONCE), b.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([(x.to(dtype) * y.to(dtype)).sum(1).double() for x, y in parts])


def constant(features: Tensor) -> Tensor:
    """Detach, in a tensor that autograd can hold: an inference tensor is copied."""
    copied = features.is_inference() and not torch.is_inference_mode_enabled()
    return features.clone() if copied else features.detach()


@dataclass(frozen=True)
class Side:
    """Consecutive pairs, seen from their images or from their texts.

    features: (n, d). teacher: (n, d_t) or None. ids: (n, k) int, or None where no two pairs share one; shared: (n,)
    bool, those whose ids occur more than once. first: position of the first in the global batch; None for a queue.
    """

    features: Tensor
    teacher: Tensor | None = None
    ids: Tensor | None = None
    shared: Tensor | None = None
    first: int | None = 0

    def __len__(self) -> int:
        return len(self.features)

    def to(self, dtype: torch.dtype) -> Side:
        teacher = None if self.teacher is None else self.teacher.to(dtype)
        return replace(self, features=self.features.to(dtype), teacher=teacher)

    @property
    def compared(self) -> list[Tensor]:
        """Features that are compared: the model's and, if there is one, the teacher's."""
        return [self.features] if self.teacher is None else [self.features, self.teacher]

    def part(self, start: int, stop: int) -> Side:
        teacher, ids, shared = (None if x is None else x[start:stop] for x in (self.teacher, self.ids, self.shared))
        first = None if self.first is None else self.first + start
        return Side(self.features[start:stop], teacher, ids, shared, first)


@dataclass
class Sums:
    """Over the negatives of n anchors, float64: log-sums of x and of r, and how many negatives there are."""

    weighted: Tensor
    normaliser: Tensor
    count: Tensor

    @classmethod
    def empty(cls, n: int, device: torch.device) -> Sums:
        low = torch.full((2, n), -torch.inf, dtype=torch.float64, device=device)
        return cls(low[0], low[1], torch.zeros(n, dtype=torch.float64, device=device))

    def part(self, start: int, length: int) -> Sums:
        return Sums(*(value[start : start + length] for value in (self.weighted, self.normaliser, self.count)))

    def add(self, more: Sums, start: int = 0) -> None:
        """Add further negatives of the anchors from `start` on."""
        part = slice(start, start + len(more.count))
        self.weighted[part] = torch.logaddexp(self.weighted[part], more.weighted)
        self.normaliser[part] = torch.logaddexp(self.normaliser[part], more.normaliser)
        self.count[part] += more.count


@dataclass(frozen=True)
class Kept:
    """Bounds of drop_below: the least r_ij of a negative that stays, per row and column. Those that stay weigh 1."""

    rows: Tensor
    columns: Tensor

    def part(self, rows: slice, columns: slice) -> Kept:
        return Kept(self.rows[rows], self.columns[columns])


def feature_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype to which features are cast before they come here."""
    return wide(features)


def sums(
    rows: Side,
    columns: Side,
    logit_scale: Tensor,
    regulation: Regulation,
    both: bool = True,
    kept: Kept | None = None,
) -> tuple[Sums, Sums]:
    """Sums of the rows over these columns, and of the columns over these rows (left empty unless `both`).

    With `kept`, `weighted` is the log-sum of z over the negatives that stay, and `count` their number.
    """
    similarities = Similarities(regulation, TILE, rows, columns, float(logit_scale))
    of_rows, of_columns = (Sums.empty(len(side), side.features.device) for side in (rows, columns))
    for i, j, row, column in tiles_of(rows, columns):
        excluded = Excluded(row, column)
        if kept is not None:
            some = kept.part(slice(i, i + len(row)), slice(j, j + len(column)))
            row_sums, column_sums = _sums_of_kept(*similarities.logarithms(row, column), excluded, some)
        elif (fast := similarities.exponentials(row, column)) is not None:
            row_sums, column_sums = _sums_of_exponentials(*fast, excluded)
        else:
            row_sums, column_sums = _sums_of_logarithms(*similarities.logarithms(row, column), excluded)
        of_rows.add(row_sums(), i)
        if both:
            of_columns.add(column_sums(), j)
    return of_rows, of_columns


def gradients(
    rows: Side,
    columns: Side,
    logit_scale: Tensor,
    regulation: Regulation,
    shifts: tuple[Tensor, Tensor | None],
    own: Tensor,
    into: tuple[Tensor, Tensor | None],
    kept: Kept | None = None,
) -> None:
    """Add G columns.features to into[0] (n, d), and G^T rows.features to into[1] (m, d) if there is one.

    shifts: a (n,), and b (m,) or None, where only the rows are anchors. own: (n,) value of G between a row and its own
    column. With `kept`, G_ij is over those that stay, with z in place of x.
    """
    similarities = Similarities(regulation, TILE, rows, columns, float(logit_scale))
    dtype = rows.features.dtype
    row_shift, column_shift = shifts
    into_rows, into_columns = into
    for i, j, row, column in tiles_of(rows, columns):
        a = row_shift[i : i + len(row)]
        b = None if column_shift is None else column_shift[j : j + len(column)]
        if kept is None and (fast := similarities.exponentials(row, column, normaliser=False)) is not None:
            weights, shift, _ = fast
            factor = (a + shift).exp().to(dtype)[:, None]
            if b is not None:
                factor = torch.add(
                    factor, (b + shift).exp().to(dtype)[None], out=similarities.buffer(1, *weights.shape)
                )
            weights.mul_(factor)
        else:
            z, r = similarities.logarithms(row, column)
            x = z if kept is not None else z + r
            weights = (x + a.to(dtype)[:, None]).exp()
            some = None if kept is None else kept.part(slice(i, i + len(row)), slice(j, j + len(column)))
            if some is not None:
                weights.masked_fill_(r < some.rows.to(dtype)[:, None], 0.0)
            if b is not None:
                of_columns = (x + b.to(dtype)).exp()
                if some is not None:
                    of_columns.masked_fill_(r < some.columns.to(dtype), 0.0)
                weights += of_columns
        excluded = Excluded(row, column)
        excluded.fill(weights, 0.0)
        excluded.fill_own(weights, own[i : i + len(row)].to(dtype))
        into_rows[i : i + len(row)].addmm_(weights, column.features)
        if into_columns is not None:
            into_columns[j : j + len(column)].addmm_(weights.T, row.features)


def tiles_of(rows: Side, columns: Side, shape: tuple[int, int] | None = None) -> Iterator[tuple[int, int, Side, Side]]:
    """Yield first row, first column, rows and columns of each tile of at most `shape` (None: TILE)."""
    height, width = TILE if shape is None else shape
    for j in range(0, len(columns), width):
        column = columns.part(j, j + width)
        for i in range(0, len(rows), height):
            yield i, j, rows.part(i, i + height), column


class Similarities:
    """Similarities of one tile after the other, in buffers that the next one overwrites."""

    def __init__(
        self, regulation: Regulation, shape: tuple[int, int], rows: Side, columns: Side, logit_scale: float
    ) -> None:
        self.regulation = regulation
        self.scale = logit_scale
        size = min(shape[0], len(rows)) * min(shape[1], len(columns))
        self._buffers = [rows.features.new_empty(size) for _ in range(3)]
        self._nothing = rows.features.new_zeros(1)
        self._longest = _longest_product(rows.features, columns.features)
        self._steepness = regulation.steepness * self._longest
        if regulation.teacher:
            longest = max(self._longest, _longest_product(*_teachers(rows, columns)))
            self._steepness = regulation.steepness * longest

    def exponentials(
        self, row: Side, column: Side, normaliser: bool = True
    ) -> tuple[Tensor, float, Tensor | None] | None:
        """Return e^(x - shift), the shift, and e^r (None where 1 or not asked for); None where no shift serves all."""
        regulation = self.regulation
        if self._steepness > STEEPEST or abs(self.scale) < _SMALLEST_SCALE:
            return None
        if not regulation.teacher:
            return self._without_teacher(row, column, normaliser and not regulation.even)
        z = self._product(0, row.features, column.features, self.scale)
        shift = self._shift(z)
        if shift is None:
            return None
        if regulation.alpha == 1.0:
            r = self._product(1, *_teachers(row, column), -regulation.teacher_sharpness)
            z.add_(r).sub_(shift).exp_()
            return z, shift, r.exp_() if normaliser else None
        s = self._product(1, *_teachers(row, column), regulation.teacher_sharpness).exp_()
        student = torch.mul(z, regulation.sharpness / self.scale, out=self.buffer(2, *z.shape)).exp_()
        # not lerp: in float32 its 1 - alpha is 0 for alpha next to 1
        inverse = s.mul_(regulation.alpha).add_(student, alpha=1.0 - regulation.alpha).reciprocal_()
        z.sub_(shift).exp_().mul_(inverse)
        return z, shift, inverse if normaliser else None

    def _without_teacher(self, row: Side, column: Side, normaliser: bool) -> tuple[Tensor, float, Tensor | None] | None:
        sharpness = 0.0 if self.regulation.even else self.regulation.sharpness
        steepness = self.scale - sharpness
        if abs(steepness) < 1e-3 * sharpness:
            return None
        x = self._product(0, row.features, column.features, steepness)
        shift = self._shift(x)
        if shift is None:
            return None
        r = torch.mul(x, -sharpness / steepness, out=self.buffer(1, *x.shape)).exp_() if normaliser else None
        return (x.sub_(shift) if shift else x).exp_(), shift, r

    def logarithms(self, row: Side, column: Side) -> tuple[Tensor, Tensor]:
        """Return z, scale times cosine, and r = -log s of a tile."""
        cosine = row.features @ column.features.T
        teacher_cosine = None
        if self.regulation.teacher:
            teacher_rows, teacher_columns = _teachers(row, column)
            teacher_cosine = teacher_rows @ teacher_columns.T
        return self.scale * cosine, -self.regulation.log_similarity(cosine, teacher_cosine)

    def buffer(self, which: int, rows: int, columns: int) -> Tensor:
        return self._buffers[which][: rows * columns].view(rows, columns)

    def _product(self, which: int, a: Tensor, b: Tensor, factor: float) -> Tensor:
        return torch.addmm(self._nothing, a, b.T, beta=0, alpha=factor, out=self.buffer(which, len(a), len(b)))

    def _shift(self, exponents: Tensor) -> float | None:
        """Return a shift that keeps every exponent of the tile within ±HALF_SPAN less the steepness, or None."""
        reach = HALF_SPAN - self._steepness
        if abs(self.scale) * self._longest <= reach:
            return 0.0
        low, high = (float(end) for end in torch.aminmax(exponents))
        return (low + high) / 2 if high - low <= 2 * reach else None


class Excluded:
    """Entries of a tile where a pair meets itself, or one that shares an id with it."""

    def __init__(self, row: Side, column: Side) -> None:
        self.shape = len(row), len(column)
        self.offset: int | None = None
        if row.first is not None and column.first is not None:
            offset = row.first - column.first
            if -len(row) < offset < len(column):
                self.offset = offset
        self.pairs: tuple[Tensor, Tensor] | None = None
        self._row, self._column = row, column
        if row.ids is not None and column.ids is not None:
            assert row.shared is not None
            assert column.shared is not None
            rows, columns = row.shared.nonzero()[:, 0], column.shared.nonzero()[:, 0]
            if len(rows) and len(columns):
                found = (row.ids[rows][:, None] == column.ids[columns]).any(-1).nonzero()
                self.pairs = rows[found[:, 0]], columns[found[:, 1]]

    def fill(self, tile: Tensor, value: float) -> Tensor:
        if self.offset is not None:
            tile.diagonal(self.offset).fill_(value)
        if self.pairs is not None:
            tile[self.pairs] = value
        return tile

    def fill_own(self, tile: Tensor, own: Tensor) -> None:
        """Fill the entries where a row meets its own column. own: (rows,) values."""
        if self.offset is not None:
            diagonal = tile.diagonal(self.offset)
            start = max(0, -self.offset)
            diagonal.copy_(own[start : start + len(diagonal)])

    def counts(self) -> tuple[Tensor, Tensor]:
        """Count each row's and each column's excluded entries: (rows,) and (columns,) int64."""
        device = self._row.features.device
        rows, columns = (torch.zeros(n, dtype=torch.int64, device=device) for n in self.shape)
        if self.pairs is not None:
            rows += torch.bincount(self.pairs[0], minlength=len(rows))
            columns += torch.bincount(self.pairs[1], minlength=len(columns))
        if self.offset is not None:
            start = max(0, -self.offset)
            places = torch.arange(start, min(len(rows), len(columns) - self.offset), device=device)
            if self.pairs is not None and self._row.shared is not None:  # a shared id is shared with oneself too
                places = places[~self._row.shared[places]]
            rows[places] += 1
            columns[places + self.offset] += 1
        return rows, columns


_Sums = Callable[[], Sums]  # sums of rows, and of columns, each computed where it is called for


def _sums_of_exponentials(x: Tensor, shift: float, r: Tensor | None, excluded: Excluded) -> tuple[_Sums, _Sums]:
    excluded.fill(x, 0.0)
    if r is not None:
        excluded.fill(r, 0.0)
    counts = excluded.counts()

    def along(dim: int) -> Sums:
        weighted = x.sum(dim).double().log() + shift
        normaliser = torch.full_like(weighted, -torch.inf) if r is None else r.sum(dim).double().log()
        return Sums(weighted, normaliser, x.shape[dim] - counts[1 - dim].double())

    return partial(along, 1), partial(along, 0)


def _sums_of_logarithms(z: Tensor, r: Tensor, excluded: Excluded) -> tuple[_Sums, _Sums]:
    excluded.fill(r, -torch.inf)
    x = z.add_(r)
    counts = excluded.counts()

    def along(dim: int) -> Sums:
        weighted, normaliser = (part.logsumexp(dim).double() for part in (x, r))
        return Sums(weighted, normaliser, x.shape[dim] - counts[1 - dim].double())

    return partial(along, 1), partial(along, 0)


def _sums_of_kept(z: Tensor, r: Tensor, excluded: Excluded, kept: Kept) -> tuple[_Sums, _Sums]:
    excluded.fill(r, -torch.inf)

    def along(dim: int, least: Tensor) -> Sums:
        stays = r >= least.to(r.dtype)
        weighted = z.masked_fill(~stays, -torch.inf).logsumexp(dim).double()
        return Sums(weighted, torch.full_like(weighted, -torch.inf), stays.sum(dim).double())

    return partial(along, 1, kept.rows[:, None]), partial(along, 0, kept.columns)


def _teachers(rows: Side, columns: Side) -> tuple[Tensor, Tensor]:
    assert rows.teacher is not None
    assert columns.teacher is not None
    return rows.teacher, columns.teacher


def _longest_product(a: Tensor, b: Tensor) -> float:
    """Bound |<a_i, b_j>| over all pairs of rows."""
    if not len(a) or not len(b):
        return 0.0
    return float(torch.linalg.vector_norm(a, dim=1).max() * torch.linalg.vector_norm(b, dim=1).max())
