"""Rank, world and collectives over torch.distributed; every function also works in one process without a group.

`gather_rows` and `sum_over_ranks` are raw: they cut the gradient. `gather_rows_with_grad` is differentiable: its
backward sends to every rank the gradient that all ranks hold for that rank's rows (a reduce-scatter with SUM), so
that a loss summed over ranks is differentiated exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sacl_ds.errors import SharedError, UserError

Group = ProcessGroup | None


def initialised() -> bool:
    """Whether this process has joined the others of its job."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    return dist.get_world_size(group) if initialised() else 1


def rank(group: Group = None) -> int:
    return dist.get_rank(group) if initialised() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The object that rank `source` passed, on every rank (pickled: only between ranks of one job)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


@contextmanager
def same_error() -> Iterator[None]:
    """Around work without collectives: if any rank raises UserError, every rank raises the first one's.

    Otherwise the others would wait for ever for the one that failed. Leaving the block is a synchronisation.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    for said in gather_objects(message):
        if said is not None:
            raise SharedError(said)


def sum_over_ranks(value: Tensor, group: Group = None) -> Tensor:
    """A new tensor: the sum of `value` over ranks, without gradient."""
    total = value.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def max_over_ranks(value: Tensor, group: Group = None) -> Tensor:
    """A new tensor: the greatest of each element of `value` over ranks, without gradient."""
    greatest = value.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=group)
    return greatest


def row_counts(rows: Tensor, group: Group = None) -> list[int]:
    """How many rows each rank holds: len(rows), in rank order. One small collective and a host sync."""
    if world_size(group) == 1:
        return [len(rows)]
    mine = torch.tensor([len(rows)], dtype=torch.int64, device=rows.device)
    counts = torch.empty(world_size(group), dtype=torch.int64, device=rows.device)
    dist.all_gather_into_tensor(counts, mine, group=group)
    return counts.tolist()


def start_gather_rows(rows: Tensor, counts: list[int], group: Group = None) -> Callable[[], Tensor]:
    """Begin `gather_rows`; the function returned waits for its end and gives its result."""
    rows = rows.detach()
    world = world_size(group)
    if world == 1:
        return lambda: rows
    longest = max(counts)
    gathered = rows.new_empty(world * longest, *rows.shape[1:])
    work = dist.all_gather_into_tensor(gathered, _padded(rows, longest), group=group, async_op=True)
    assert work is not None

    def finish() -> Tensor:
        work.wait()
        if min(counts) == longest:
            return gathered
        return torch.cat([part[:count] for part, count in zip(gathered.split(longest), counts, strict=True)])

    return finish


def gather_rows(rows: Tensor, counts: list[int], group: Group = None) -> Tensor:
    """All ranks' rows in rank order, (sum(counts), ...), without gradient.

    counts: rows per rank, from `row_counts`. Uneven counts are padded on the wire, since gloo gathers equal sizes only.
    """
    return start_gather_rows(rows, counts, group)()


def start_sum_to_owners(parts: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """Begin to give each rank r the sum over ranks of parts[r], (world, n, ...) -> (n, ...); the function returned
    waits for its end and gives it."""
    if world_size(group) == 1:
        return lambda: parts[0]
    mine = torch.empty_like(parts[0])
    work = dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=group, async_op=True)
    assert work is not None

    def finish() -> Tensor:
        work.wait()
        return mine

    return finish


def gather_rows_with_grad(rows: Tensor, counts: list[int], group: Group = None) -> Tensor:
    """`gather_rows` that lets the gradient back to the rank that owns each row, summed over ranks."""
    if world_size(group) == 1:
        return rows
    return _GatherRows.apply(rows, counts, group)


def _padded(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        longest = max(ctx.counts)
        parts = torch.stack([_padded(part, longest) for part in gradient.split(ctx.counts)])
        return start_sum_to_owners(parts, ctx.group)()[: ctx.counts[rank(ctx.group)]], None, None
