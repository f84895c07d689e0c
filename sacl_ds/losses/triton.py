"""Tiles of the similarity matrix as Triton kernels: `sums` and `gradients` do what those of `tiles.py` do.

On CUDA, or anywhere in Triton's interpreter (TRITON_INTERPRET=1); bfloat16, float16 and float32 features of any width.

Products of features run on tensor cores in the features' own type, float32 with the precision that PyTorch is set to;
everything after them is float32. No atomics: the same input gives the same bits.

The forward kernel fuses the products with both directions' running log-sums. A program owns a block of rows and walks
over a span of columns; it keeps its rows' sums in registers and writes, per tile, its share of the columns' sums. The
backward kernel writes G, a piece of the matrix at a time, in the features' type; cuBLAS multiplies the piece with the
features, which is faster than any kernel that would have to hold (rows, d) sums in registers.

Below: what both kernels share, the two kernels, their launcher, and the two functions that use them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sacl_ds.losses.regulated import Regulation
from sacl_ds.losses.tiles import Kept, Side, Sums

# KIND: what s_ij is made of
EVEN = tl.constexpr(0)  # 1, the weights are all alike
STUDENT = tl.constexpr(1)  # the trained model's cosine
TEACHER = tl.constexpr(2)  # the teacher's cosine
MIXED = tl.constexpr(3)  # both

# largest piece of the matrix that one launch works on: bounds the memory of partial sums and of G
_SUM_PIECE = 8192, 32768
_GRADIENT_PIECE = 2048, 8192
_SPAN = 4096  # columns that one program of the forward kernel walks over


@triton.jit
def _product(
    a, b, row, column, n_rows, n_columns, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<a_i, b_j> of the tile that begins at (row, column), float32. a, b: (n, width), contiguous."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    rows, columns, places = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS), tl.arange(0, BLOCK_WIDTH)
    # int64 for the tile's origin: row * width passes 2^31 at 2^22 rows of 512; inside a tile int32 spares registers
    one = tl.full((), 1, dtype=tl.int64)
    a += one * row * width
    b += one * column * width
    a_places = rows[:, None] * width + places[None, :]
    b_places = columns[None, :] * width + places[:, None]
    for start in range(0, width, BLOCK_WIDTH):
        left = places < width - start
        some_a = tl.load(a + start + a_places, (rows < n_rows - row)[:, None] & left[None, :], 0.0)
        some_b = tl.load(b + start + b_places, (columns < n_columns - column)[None, :] & left[:, None], 0.0)
        if PRECISION == "interpreted":  # whose products take bfloat16 for integers
            total += tl.dot(some_a.to(tl.float32), some_b.to(tl.float32))
        else:
            total = tl.dot(some_a, some_b, total, input_precision=PRECISION)
    return total


@triton.jit
def _similarity(
    v, t, teacher_v, teacher_t, row, column, n_rows, n_columns, width, teacher_width, scale, sharpness,
    teacher_sharpness, log_student, log_teacher, KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z and r of the tile that begins at (row, column)."""
    cosine = _product(v, t, row, column, n_rows, n_columns, width, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, PRECISION)
    r = tl.zeros_like(cosine)
    if KIND == STUDENT:
        r = -sharpness * cosine
    elif KIND != EVEN:
        of_teacher = teacher_sharpness * _product(
            teacher_v, teacher_t, row, column, n_rows, n_columns, teacher_width,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, PRECISION,
        )  # fmt: skip
        if KIND == TEACHER:
            r = -of_teacher
        else:
            of_teacher += log_teacher
            of_student = sharpness * cosine + log_student
            top = tl.maximum(of_teacher, of_student)
            r = -top - tl.log(tl.exp(of_teacher - top) + tl.exp(of_student - top))
    return scale * cosine, r


@triton.jit
def _excluded(
    row_ids, column_ids, rows, columns, n_rows, n_columns, offset, SAME_BATCH: tl.constexpr, ID_COLUMNS: tl.constexpr
):
    """Mask of what is outside the matrix, a pair with itself, or pairs that share an id. Ids: (ID_COLUMNS, n) int32."""
    out = (rows >= n_rows)[:, None] | (columns >= n_columns)[None, :]
    if SAME_BATCH:
        out = out | (rows[:, None] + offset == columns[None, :])
    for k in tl.static_range(ID_COLUMNS):
        mine = tl.load(row_ids + k * n_rows + rows, rows < n_rows, -1)
        theirs = tl.load(column_ids + k * n_columns + columns, columns < n_columns, -2)
        out = out | (mine[:, None] == theirs[None, :])
    return out


@triton.jit
def _log_sum(x, top, sums, AXIS: tl.constexpr):
    """The running (top, sums of e^(x - top)) with a tile's exponents taken in along AXIS."""
    higher = tl.maximum(top, tl.max(x, AXIS))
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    if AXIS == 1:
        added = tl.sum(tl.exp(x - finite[:, None]), 1)
    else:
        added = tl.sum(tl.exp(x - finite[None, :]), 0)
    return higher, sums * tl.exp(top - finite) + added


@triton.jit
def sums_kernel(
    v, t, teacher_v, teacher_t, row_ids, column_ids, row_least, column_least, logit_scale, of_rows, of_columns,
    n_rows, n_columns, width, teacher_width, offset, span, sharpness, teacher_sharpness, log_student, log_teacher,
    KIND: tl.constexpr, SAME_BATCH: tl.constexpr, ID_COLUMNS: tl.constexpr, KEPT: tl.constexpr, BOTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sums of a piece of the matrix; program (i, j) has block i of the rows and span j of the columns.

    Features' type, contiguous:
      v (n_rows, width), t (n_columns, width): rows and columns.
      teacher_v (n_rows, teacher_width), teacher_t (n_columns, teacher_width): read if KIND is TEACHER or MIXED.
    int32, read if ID_COLUMNS:
      row_ids (ID_COLUMNS, n_rows), column_ids (ID_COLUMNS, n_columns): ids of the pairs; a match excludes.
    float32:
      row_least (n_rows), column_least (n_columns): the least r that stays for a row and for a column; read if KEPT.
      logit_scale (1).
      of_rows (spans, 3, n_rows), out: log-sum of x, log-sum of r, and count of a row over each span of columns.
      of_columns (row blocks, 3, n_columns), out if BOTH: the same of a column over each block of rows.
        The log-sum of r is left unwritten if KIND is EVEN, or KEPT.
    Numbers: offset, row i of the piece is the pair of column i + offset (if SAME_BATCH); span, columns a program walks
    over; sharpness, teacher_sharpness, of the regulation, and log_student, log_teacher, its log_shares.
    Constants: KIND, what s_ij is made of. SAME_BATCH, rows and columns are of one batch. ID_COLUMNS, how many ids a
    pair has. KEPT, sums are of z over what stays, in place of x over all negatives. BOTH, columns are anchors too.
    BLOCK_ROWS, BLOCK_COLUMNS, a tile's; BLOCK_WIDTH, how much of the width is multiplied at a time; PRECISION, of
    tl.dot, or "interpreted".
    """
    scale = tl.load(logit_scale)
    row = tl.program_id(0) * BLOCK_ROWS
    rows = row + tl.arange(0, BLOCK_ROWS)
    inside = rows < n_rows
    row_bound = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    if KEPT:
        row_bound = tl.load(row_least + rows, inside, 0.0)
    x_top = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
    r_top = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
    x_sum = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    r_sum = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    count = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, n_columns), BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        z, r = _similarity(
            v, t, teacher_v, teacher_t, row, start, n_rows, n_columns, width, teacher_width, scale, sharpness,
            teacher_sharpness, log_student, log_teacher, KIND, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, PRECISION,
        )  # fmt: skip
        out = _excluded(row_ids, column_ids, rows, columns, n_rows, n_columns, offset, SAME_BATCH, ID_COLUMNS)
        r = tl.where(out, float("-inf"), r)
        if KIND != EVEN and not KEPT:
            r_top, r_sum = _log_sum(r, r_top, r_sum, 1)
        if KEPT:
            x = tl.where(r >= row_bound[:, None], z, float("-inf"))
        else:
            x = z + r
        x_top, x_sum = _log_sum(x, x_top, x_sum, 1)
        count += tl.sum(tl.where(x > float("-inf"), 1.0, 0.0), 1)
        if BOTH:
            if KEPT:
                column_bound = tl.load(column_least + columns, columns < n_columns, 0.0)
                x = tl.where(r >= column_bound[None, :], z, float("-inf"))
            low = tl.full((BLOCK_COLUMNS,), float("-inf"), dtype=tl.float32)
            none = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
            into = of_columns + tl.program_id(0).to(tl.int64) * 3 * n_columns + columns
            top, total = _log_sum(x, low, none, 0)
            tl.store(into, top + tl.log(total), columns < n_columns)
            if KIND != EVEN and not KEPT:
                top, total = _log_sum(r, low, none, 0)
                tl.store(into + n_columns, top + tl.log(total), columns < n_columns)
            tl.store(into + 2 * n_columns, tl.sum(tl.where(x > float("-inf"), 1.0, 0.0), 0), columns < n_columns)
    into = of_rows + tl.program_id(1).to(tl.int64) * 3 * n_rows + rows
    tl.store(into, x_top + tl.log(x_sum), inside)
    if KIND != EVEN and not KEPT:
        tl.store(into + n_rows, r_top + tl.log(r_sum), inside)
    tl.store(into + 2 * n_rows, count, inside)


@triton.jit
def gradient_kernel(
    v, t, teacher_v, teacher_t, row_ids, column_ids, row_least, column_least, logit_scale, row_shift, column_shift,
    own, out, row_lost, column_lost, n_rows, n_columns, width, teacher_width, offset, sharpness, teacher_sharpness,
    log_student, log_teacher,
    KIND: tl.constexpr, SAME_BATCH: tl.constexpr, ID_COLUMNS: tl.constexpr, KEPT: tl.constexpr, BOTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G of a piece of the matrix; program (i, j) has block i of the rows and block j of the columns.

    Arguments as in `sums_kernel`, and
      row_shift (n_rows), column_shift (n_columns), float32: a and b of G_ij = e^(x_ij + a_i) + e^(x_ij + b_j); the
        latter read if BOTH.
      own (n_rows), float32: G between a row and its own column; read if SAME_BATCH.
      out (n_rows, n_columns), out, the features' type: G.
      row_lost (column blocks, n_rows), column_lost (row blocks, n_columns), float32, out unless out is float32: sums of
        what rounding to that type took away.
    """
    scale = tl.load(logit_scale)
    row, column = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_COLUMNS
    rows, columns = row + tl.arange(0, BLOCK_ROWS), column + tl.arange(0, BLOCK_COLUMNS)
    z, r = _similarity(
        v, t, teacher_v, teacher_t, row, column, n_rows, n_columns, width, teacher_width, scale, sharpness,
        teacher_sharpness, log_student, log_teacher, KIND, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, PRECISION,
    )  # fmt: skip
    # excluded exponents may lie above every sum: they must not reach exp
    out_of_sums = _excluded(row_ids, column_ids, rows, columns, n_rows, n_columns, offset, SAME_BATCH, ID_COLUMNS)
    r = tl.where(out_of_sums, float("-inf"), r)
    of_rows = tl.load(row_shift + rows, rows < n_rows, float("-inf"))[:, None]
    if KEPT:
        least = tl.load(row_least + rows, rows < n_rows, 0.0)[:, None]
        g = tl.exp(tl.where(r >= least, z + of_rows, float("-inf")))
    else:
        g = tl.exp(z + r + of_rows)
    if BOTH:
        of_columns = tl.load(column_shift + columns, columns < n_columns, float("-inf"))[None, :]
        if KEPT:
            least = tl.load(column_least + columns, columns < n_columns, 0.0)[None, :]
            g += tl.exp(tl.where(r >= least, z + of_columns, float("-inf")))
        else:
            g += tl.exp(z + r + of_columns)
    if SAME_BATCH:
        mine = tl.load(own + rows, rows < n_rows, 0.0)
        g = tl.where(rows[:, None] + offset == columns[None, :], mine[:, None], g)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    rounded = g.to(out.dtype.element_ty)
    tl.store(out + rows.to(tl.int64)[:, None] * n_columns + columns[None, :], rounded, inside)
    if out.dtype.element_ty != tl.float32:
        lost = tl.where(inside, g - rounded.to(tl.float32), 0.0)
        tl.store(row_lost + tl.program_id(1) * n_rows + rows, tl.sum(lost, 1), rows < n_rows)
        tl.store(column_lost + tl.program_id(0) * n_columns + columns, tl.sum(lost, 0), columns < n_columns)


@dataclass(frozen=True)
class Blocks:
    """Tile of one program: rows x columns, and how much of the width is multiplied at a time."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int

    @classmethod
    def of(cls, kernel: Any, dtype: torch.dtype) -> Blocks:
        """Return the largest blocks that leave sm_80 and sm_90 without spilled registers (test_kernel_builds.py); not
        timed."""
        if dtype == torch.float32:
            return cls(64, 64, 32, 4, 2) if kernel is sums_kernel else cls(128, 64, 32, 8, 2)
        return cls(128, 64, 64, 8, 3)


class _Piece(NamedTuple):
    """Part of the matrix for one launch. i, j: its first row and column; kept: the bounds of its rows and columns."""

    i: int
    j: int
    row: Side
    column: Side
    kept: Kept | None


def _pieces(rows: Side, columns: Side, kept: Kept | None, shape: tuple[int, int]) -> Iterator[_Piece]:
    for j in range(0, len(columns), shape[1]):
        for i in range(0, len(rows), shape[0]):
            some = None if kept is None else kept.part(slice(i, i + shape[0]), slice(j, j + shape[1]))
            yield _Piece(i, j, rows.part(i, i + shape[0]), columns.part(j, j + shape[1]), some)


def _launch(
    kernel: Any,
    grid: tuple[int, int],
    piece: _Piece,
    logit_scale: Tensor,
    regulation: Regulation,
    both: bool,
    own_arguments: list[Tensor],
    **more: int,
) -> None:
    """Launch a kernel on a piece. own_arguments: what the kernel takes between logit_scale and n_rows."""
    _, _, row, column, kept = piece
    features = row.features
    none = features.new_empty(0, dtype=torch.float32)
    teacher = (row.teacher, column.teacher) if regulation.teacher else (features, column.features)
    assert teacher[0] is not None
    assert teacher[1] is not None
    with_ids = row.ids is not None and column.ids is not None
    ids = [side.ids.T.contiguous().int() if with_ids and side.ids is not None else none for side in (row, column)]
    same_batch = row.first is not None and column.first is not None
    log_teacher, log_student = regulation.log_shares
    blocks = Blocks.of(kernel, features.dtype)
    kernel[grid](
        features.contiguous(), column.features.contiguous(), teacher[0].contiguous(), teacher[1].contiguous(), *ids,
        none if kept is None else kept.rows.float(), none if kept is None else kept.columns.float(),
        logit_scale.float().reshape(1), *own_arguments,
        len(row), len(column), features.shape[1], teacher[0].shape[1],
        row.first - column.first if row.first is not None and column.first is not None else 0,
        **more, sharpness=regulation.sharpness, teacher_sharpness=regulation.teacher_sharpness,
        log_student=log_student, log_teacher=log_teacher,
        KIND=_kind(regulation), SAME_BATCH=same_batch, ID_COLUMNS=ids[0].shape[0] if with_ids else 0,
        KEPT=kept is not None, BOTH=both,
        BLOCK_ROWS=blocks.rows, BLOCK_COLUMNS=blocks.columns, BLOCK_WIDTH=blocks.width,
        PRECISION=_precision(features),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def _kind(regulation: Regulation) -> int:
    if regulation.even:
        return EVEN.value
    if regulation.alpha == 0.0:
        return STUDENT.value
    return TEACHER.value if regulation.alpha == 1.0 else MIXED.value


def _precision(features: Tensor) -> str:
    if not features.is_cuda:
        return "interpreted"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def feature_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype to which features are cast before they come here: their own."""
    return features.dtype


def sums(
    rows: Side,
    columns: Side,
    logit_scale: Tensor,
    regulation: Regulation,
    both: bool = True,
    kept: Kept | None = None,
) -> tuple[Sums, Sums]:
    """Same as `tiles.sums`."""
    of_rows, of_columns = (Sums.empty(len(side), side.features.device) for side in (rows, columns))
    without_normaliser = regulation.even or kept is not None
    for piece in _pieces(rows, columns, kept, _SUM_PIECE):
        row, column = piece.row, piece.column
        blocks = Blocks.of(sums_kernel, row.features.dtype)
        grid = triton.cdiv(len(row), blocks.rows), triton.cdiv(len(column), _SPAN)
        row_parts = row.features.new_empty(grid[1], 3, len(row), dtype=torch.float32)
        column_parts = row.features.new_empty(grid[0] if both else 0, 3, len(column), dtype=torch.float32)
        _launch(sums_kernel, grid, piece, logit_scale, regulation, both, [row_parts, column_parts], span=_SPAN)
        of_rows.add(_together(row_parts, without_normaliser), piece.i)
        if both:
            of_columns.add(_together(column_parts, without_normaliser), piece.j)
    return of_rows, of_columns


def _together(parts: Tensor, without_normaliser: bool) -> Sums:
    """Add up the parts' log-sums. parts: (parts, 3, n) float32, the second plane unwritten if `without_normaliser`."""
    weighted = parts[:, 0].double().logsumexp(0)
    if without_normaliser:
        normaliser = torch.full_like(weighted, -torch.inf)
    else:
        normaliser = parts[:, 1].double().logsumexp(0)
    return Sums(weighted, normaliser, parts[:, 2].sum(0, dtype=torch.float64))


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
    """Same as `tiles.gradients`."""
    row_shift, own = shifts[0].float(), own.float()
    both = shifts[1] is not None
    column_shift = row_shift.new_empty(0) if shifts[1] is None else shifts[1].float()
    # rounding G errs most along what the features have in common, where the terms of a gradient cancel
    row_mean, column_mean = (side.features.mean(0, dtype=torch.float32) for side in (rows, columns))
    for piece in _pieces(rows, columns, kept, _GRADIENT_PIECE):
        i, j, row, column, _ = piece
        blocks = Blocks.of(gradient_kernel, row.features.dtype)
        grid = triton.cdiv(len(row), blocks.rows), triton.cdiv(len(column), blocks.columns)
        g = row.features.new_empty(len(row), len(column))
        row_lost = own.new_zeros(grid[1], len(row))
        column_lost = own.new_zeros(grid[0], len(column))
        of_piece = [row_shift[i : i + len(row)], column_shift[j : j + len(column)], own[i : i + len(row)]]
        outputs = [g, row_lost, column_lost]
        _launch(gradient_kernel, grid, piece, logit_scale, regulation, both, of_piece + outputs)
        _accumulate(into[0][i : i + len(row)], g, column.features, row_lost, column_mean)
        if into[1] is not None:
            _accumulate(into[1][j : j + len(column)], g.T, row.features, column_lost, row_mean)


def _accumulate(into: Tensor, a: Tensor, b: Tensor, lost: Tensor, mean: Tensor) -> None:
    """Add a @ b to into, summed in float32; lost: (parts, n) rounding errors of a's rows, made good along b's mean."""
    if a.dtype == torch.float32:
        into.addmm_(a, b)
        return
    into += torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
    into.addr_(lost.sum(0), mean)
