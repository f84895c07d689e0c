"""Rank, world and collectives over torch.distributed; every function also works in one process without a group.

`gather_rows` and `sum_over_ranks` are raw: they cut the gradient. `gather_rows_with_grad` is differentiable: its
backward sends to every rank the gradient that all ranks hold for that rank's rows (a reduce-scatter with SUM), so
that a loss summed over ranks is differentiated exactly.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sacl_ds.errors import SharedError, UserError

Group = ProcessGroup | None
_WRONG = "arguments"  # of `row_counts`: what is wrong with them, before all other names


def initialised() -> bool:
    """Return whether this process has joined the others of its job."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    return dist.get_world_size(group) if initialised() else 1


def rank(group: Group = None) -> int:
    return dist.get_rank(group) if initialised() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return on every rank the object that rank `source` passed (pickled: only between ranks of one job)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any, group: Group = None) -> list[Any]:
    """Return every rank's object, in rank order, on every rank."""
    if world_size(group) == 1:
        return [value]
    box: list[Any] = [None] * world_size(group)
    dist.all_gather_object(box, value, group)
    return box


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on every rank the first rank's UserError, if any rank raises one in this block without collectives.

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
    """Return the sum of `value` over ranks as a new tensor, without gradient."""
    total = value.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def max_over_ranks(value: Tensor, group: Group = None) -> Tensor:
    """Return the elementwise maximum of `value` over ranks as a new tensor, without gradient."""
    greatest = value.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=group)
    return greatest


def row_counts(rows: Tensor, group: Group = None, alike: Mapping[str, object] | None = None) -> list[int]:
    """Return the number of rows that each rank holds, in rank order. One small collective and a host sync.

    alike: settings by name that all ranks must have in common, as their repr; `logit_scale` among them is a tensor with
    one element, equal up to rounding. Raises SharedError on every rank where they differ.
    """
    if world_size(group) == 1:
        return [len(rows)]
    scale = (alike or {}).get("logit_scale")
    known = torch.tensor([len(rows), fingerprint(alike)], dtype=torch.float64, device=rows.device)
    last = scale.detach().to(known).reshape(1) if isinstance(scale, Tensor) else known.new_zeros(1)
    every = known.new_empty(world_size(group) * 3)
    dist.all_gather_into_tensor(every, torch.cat([known, last]), group=group)
    counts, marks, scales = zip(*every.view(-1, 3).tolist(), strict=True)
    require_alike(marks, alike, group)
    for other, value in enumerate(scales):
        if not math.isclose(value, scales[0], rel_tol=1e-4) and not (math.isnan(value) and math.isnan(scales[0])):
            raise SharedError(_difference("logit_scale", scales[0], value, other))
    return [int(count) for count in counts]


@contextmanager
def said_on_all_ranks(device: torch.device, group: Group, asks: bool) -> Iterator[None]:
    """Send a ValueError of the checks in this block to the ranks that wait for this one in `row_counts`.

    The other ranks then raise the same. asks: this rank will call `row_counts`.
    """
    try:
        yield
    except ValueError as error:
        if asks:
            row_counts(torch.empty(0, device=device), group, {_WRONG: str(error)})
        raise


def fingerprint(alike: Mapping[str, object] | None) -> int:
    """Return a hash, 32 bits, of the settings of `row_counts` without `logit_scale`."""
    return zlib.crc32(repr(_told(alike)).encode())


def require_alike(marks: Sequence[float], alike: Mapping[str, object] | None, group: Group) -> None:
    """Raise SharedError on every rank, all of which call it, for the first of the settings that one has otherwise than
    rank 0. marks: every rank's `fingerprint`."""
    if len(set(marks)) == 1:
        return
    every = gather_objects(_told(alike), group)
    for name in dict.fromkeys(name for each in every for name in each):
        for other, each in enumerate(every):
            if each.get(name) != every[0].get(name):
                raise SharedError(_difference(name, every[0].get(name), each.get(name), other))
    raise AssertionError(every)


def _told(alike: Mapping[str, object] | None) -> dict[str, str]:
    return {_WRONG: "None"} | {name: repr(value) for name, value in (alike or {}).items() if name != "logit_scale"}


def _difference(name: str, first: object, value: object, other: int) -> str:
    return f"ranks disagree on {name}: {first} on rank 0, {value} on rank {other}; call with the same on all ranks"


def start_gather_rows(rows: Tensor, counts: list[int], group: Group = None) -> Callable[[], Tensor]:
    """Start `gather_rows` asynchronously; the function returned waits for it and returns its result."""
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
    """Gather all ranks' rows in rank order, (sum(counts), ...), without gradient.

    counts: rows per rank, from `row_counts`. Uneven counts are padded on the wire, since gloo gathers equal sizes only.
    """
    return start_gather_rows(rows, counts, group)()


def reduce_scatter_async(parts: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """Start a reduce-scatter of (world, n, ...): rank r gets the (n, ...) sum over ranks of parts[r].

    The function returned waits for it and returns the sum.
    """
    if world_size(group) == 1:
        return lambda: parts[0]
    mine = torch.empty_like(parts[0])
    work = dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=group, async_op=True)
    assert work is not None

    def finish() -> Tensor:
        work.wait()
        return mine

    return finish


def differentiable_once(
    backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
) -> Callable[[Any, Tensor], tuple[Tensor | None, ...]]:
    """Refuse a backward pass that is to be differentiated again.

    torch's once_differentiable refuses only where the incoming gradient asks for one, and gives a gradient penalty that
    trains nothing elsewhere.
    """

    @wraps(backward)
    def once(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the contrastive loss can be differentiated once only, and a gradient penalty "
                "through it would be ignored; on one rank backend='reference' can be differentiated twice"
            )
        return backward(ctx, upstream)

    return once


def gather_rows_with_grad(rows: Tensor, counts: list[int], group: Group = None) -> Tensor:
    """Gather rows like `gather_rows`, with the gradient summed over ranks and returned to each row's rank."""
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
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        longest = max(ctx.counts)
        parts = torch.stack([_padded(part, longest) for part in gradient.split(ctx.counts)])
        return reduce_scatter_async(parts, ctx.group)()[: ctx.counts[rank(ctx.group)]], None, None
