"""The regulated loss in one pass over tiles, without the (pairs of this rank) x (global batch) matrix.

With r_ij = -log s_ij, n_i = |Neg(i)|, A_i = logsumexp_j (z_ij + r_ij) and B_i = logsumexp_j r_ij over Neg(i):

    X_i = log(mass * n_i) + A_i - B_i        L_i = softplus(X_i - z_ii)
    dL_i / dz_ij = p_i e^(z_ij + r_ij - A_i)   for negatives,   -p_i on the diagonal,   p_i = sigmoid(X_i - z_ii)

s_ij is the same for image anchor i and text anchor j, so that one tile of images x texts serves both: its row sums
are the images' own, its column sums are parts of the texts', which the ranks add up. Only texts (and the teacher's)
are gathered, and only the texts' gradient is sent back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, softplus

from sacl_ds.distributed import (
    Group,
    gather_rows,
    max_over_ranks,
    rank,
    row_counts,
    start_gather_rows,
    start_sum_to_owners,
    sum_over_ranks,
    world_size,
)
from sacl_ds.losses.regulated import ContrastiveOutput, Regulation
from sacl_ds.losses.tiles import Kept, Side, Sums, wide

_GRADIENT_PARTS = 4  # in which the texts' gradient is sent: one travels while the next is computed
_ROWS_AT_ONCE = 4096


class Tiles(Protocol):
    """The arithmetic of tiles: the modules `tiles` (any device; it says what each function does) and `triton`."""

    def feature_dtype(self, features: Tensor) -> torch.dtype: ...

    def sums(
        self,
        rows: Side,
        columns: Side,
        logit_scale: Tensor,
        regulation: Regulation,
        both: bool = True,
        kept: Kept | None = None,
    ) -> tuple[Sums, Sums]: ...

    def gradients(
        self,
        rows: Side,
        columns: Side,
        logit_scale: Tensor,
        regulation: Regulation,
        shifts: tuple[Tensor, Tensor | None],
        own: Tensor,
        into: tuple[Tensor, Tensor | None],
        kept: Kept | None = None,
    ) -> None: ...


@dataclass(frozen=True)
class TileJob:
    """Settings and ids that every pass over the tiles shares.

    counts: pairs per rank; ids, shared: of the pairs of all ranks and then of a queue, from `shared_ids`.
    """

    counts: list[int]
    regulation: Regulation
    tiles: Tiles
    group: Group
    ids: Tensor | None = None
    shared: Tensor | None = None

    @classmethod
    def of(
        cls,
        image: Tensor,
        pair_ids: Tensor | None,
        regulation: Regulation,
        tiles: Tiles,
        group: Group,
        counts: list[int] | None = None,
        queue_ids: Tensor | None = None,
    ) -> TileJob:
        """Gather the ids of all ranks, and the counts where they are not known."""
        counts = row_counts(image, group) if counts is None else counts
        if pair_ids is None:
            return cls(counts, regulation, tiles, group)
        ids = gather_rows(pair_ids.view(len(image), -1), counts, group)
        if queue_ids is not None:
            ids = torch.cat([ids, queue_ids.view(-1, ids.shape[1])])
        return cls(counts, regulation, tiles, group, *shared_ids(ids))

    @cached_property
    def start(self) -> int:
        """Position of this rank's first pair in the global batch."""
        return sum(self.counts[: rank(self.group)])

    @cached_property
    def share(self) -> float:
        """Loss scale 0.5 * world / global batch; data-parallel averaging then gives the mean over the global batch."""
        return 0.5 * world_size(self.group) / sum(self.counts)

    def ids_of(self, start: int, length: int) -> tuple[Tensor | None, Tensor | None]:
        """Ids and shared of `length` pairs from `start` on."""
        part = slice(start, start + length)
        return (None, None) if self.ids is None or self.shared is None else (self.ids[part], self.shared[part])

    def side(self, features: Tensor, teacher: Tensor | None, start: int) -> Side:
        """Pairs from `start` of the global batch on, in the dtype of the tiles."""
        dtype = self.tiles.feature_dtype(features)
        teacher = None if teacher is None else teacher.to(dtype)
        return Side(features.to(dtype), teacher, *self.ids_of(start, len(features)), start)


@dataclass(frozen=True)
class Joint:
    """Results of the forward pass of the joint form that its backward pass needs.

    images: this rank's pairs; texts: those of all ranks, in rank order. kept: the bounds of drop_below, for both.
    image_anchors, text_anchors: this rank's. text_shift: (N,), of all ranks' texts.
    """

    job: TileJob
    images: Side
    texts: Side
    logit_scale: Tensor
    kept: Kept | None
    image_anchors: Anchors
    text_anchors: Anchors
    text_shift: Tensor


def joint_loss(
    features: tuple[Tensor, Tensor], logit_scale: Tensor, teacher: tuple[Tensor, Tensor] | None, job: TileJob
) -> tuple[ContrastiveOutput, Joint]:
    """The differentiable loss, and its forward pass; features: (image, text) as in `similarity_regulated_loss`.

    The gradient that comes into the loss must be the same on all ranks.
    """
    image, text = features
    with torch.no_grad():
        joint = _measure(image.detach(), text.detach(), logit_scale.detach(), teacher, job)
    loss = _JointLoss.apply(image, text, logit_scale, joint)
    of_images, of_texts = (anchors.loss.to(loss.dtype) for anchors in (joint.image_anchors, joint.text_anchors))
    least = None
    if joint.kept is not None:
        least = joint.kept.rows, joint.kept.columns[job.start : job.start + len(text)]
    return ContrastiveOutput(loss, of_images, of_texts, least), joint


def shared_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids (n, k) renumbered from 0 column by column, and (n,) bool: whether a row has any of its ids from another."""
    columns, shared = [], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for column in ids.unbind(1):
        # torch.unique does the same, but waits for the device to say how many there are
        values, order = column.sort()
        again = values[1:] == values[:-1]
        number = pad((~again).cumsum(0), (1, 0))
        repeated = pad(again, (1, 0)) | pad(again, (0, 1))
        columns.append(torch.empty_like(order).scatter_(0, order, number).int())
        shared |= torch.empty_like(shared).scatter_(0, order, repeated)
    return torch.stack(columns, 1), shared


@dataclass(frozen=True)
class Anchors:
    """n anchors, float64: margin X - z_ii, loss L, pull p; shift log p - A: e^(x + shift) is a negative's gradient."""

    margin: Tensor
    loss: Tensor
    pull: Tensor
    shift: Tensor

    @classmethod
    def of(cls, sums: Sums, own: Tensor, regulation: Regulation) -> Anchors:
        """own: (n,) float64, z of each anchor and its positive. An anchor without negatives has loss and pull 0."""
        alone = sums.count == 0
        regulated = math.log(regulation.negative_mass) + sums.weighted
        if regulation.drop_below is None:
            regulated = normalised(regulated, sums, regulation)
        margin = (regulated - own).masked_fill(alone, -torch.inf)
        shift = (logsigmoid(margin) - sums.weighted).masked_fill(alone, -torch.inf)
        return cls(margin, softplus(margin, threshold=80.0), margin.sigmoid(), shift)


def normalised(logs: Tensor | float, sums: Sums, regulation: Regulation) -> Tensor:
    """Divide by the mean of 1 / s_ij over each anchor's negatives: (n,) float64 log w_ij where `logs` is r_ij.

    logs: (n,) float64, or one number for all; 0 gives minus the log of that mean. sums: over all negatives, none
    dropped. Without meaning for an anchor that has none.
    """
    return logs + torch.zeros_like(sums.count) if regulation.even else logs + sums.count.log() - sums.normaliser


def least_kept(sums: Sums, regulation: Regulation) -> Tensor:
    """(n,) float64: the least r of a negative whose mean-1 weight reaches drop_below."""
    assert regulation.drop_below is not None
    return math.log(regulation.drop_below) - normalised(0.0, sums, regulation)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """(n,) float64: <a_i, b_i> of (n, d) features, in float32 at least."""
    dtype = wide(a)
    parts = zip(a.split(_ROWS_AT_ONCE), b.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([(x.to(dtype) * y.to(dtype)).sum(1).double() for x, y in parts])


def _measure(
    image: Tensor, text: Tensor, logit_scale: Tensor, teacher: tuple[Tensor, Tensor] | None, job: TileJob
) -> Joint:
    """The forward pass: gather, sums over tiles, anchors."""
    teacher_image, teacher_text = teacher or (None, None)
    arriving = [None if t is None else start_gather_rows(t, job.counts, job.group) for t in (text, teacher_text)]
    images, own_texts = job.side(image, teacher_image, job.start), job.side(text, teacher_text, job.start)

    @cache
    def texts() -> Side:
        features, theirs = (None if wait is None else wait() for wait in arriving)
        assert features is not None
        return job.side(features, theirs, 0)

    def sums(kept: Kept | None = None) -> tuple[Sums, Sums]:
        return _all_sums(images, _own_first(own_texts, texts, sum(job.counts)), logit_scale, job, kept)

    own = row_products(images.features, own_texts.features) * logit_scale.double()
    of_images, of_texts = sums()
    kept = None
    if job.regulation.drop_below is not None:
        kept = Kept(least_kept(of_images, job.regulation), least_kept(of_texts, job.regulation))
        of_images, of_texts = sums(kept)
    of_texts = of_texts.part(job.start, len(text))
    image_anchors, text_anchors = (Anchors.of(sums, own, job.regulation) for sums in (of_images, of_texts))
    text_shift = gather_rows(text_anchors.shift.to(wide(image)), job.counts, job.group)
    return Joint(job, images, texts(), logit_scale, kept, image_anchors, text_anchors, text_shift)


def without_autocast(
    backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
) -> Callable[[Any, Tensor], tuple[Tensor | None, ...]]:
    """Keep the types of an autograd.Function's products where a user runs backward under autocast."""

    @wraps(backward)
    def exact(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(upstream.device.type, enabled=False):
            return backward(ctx, upstream)

    return exact


class _JointLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, joint: Joint) -> Tensor:
        ctx.joint = joint
        ctx.save_for_backward(image, text, logit_scale)  # for their shapes, and to notice changes in place
        total = (joint.image_anchors.loss + joint.text_anchors.loss).sum() * joint.job.share
        return total.to(wide(image))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        joint: Joint = ctx.joint
        image, text, logit_scale = ctx.saved_tensors
        own = -(joint.image_anchors.pull + joint.text_anchors.pull)
        into_images = torch.zeros_like(image, dtype=wide(image))

        def gradients(start: int, stop: int, into_texts: Tensor) -> None:
            kept = None if joint.kept is None else joint.kept.part(slice(None), slice(start, stop))
            shifts = joint.image_anchors.shift, joint.text_shift[start:stop]
            columns, into = joint.texts.part(start, stop), (into_images, into_texts)
            joint.job.tiles.gradients(
                joint.images, columns, joint.logit_scale, joint.job.regulation, shifts, own, into, kept
            )

        share = upstream * joint.job.share
        of_text = _sum_to_owners(gradients, joint.job, into_images.new_zeros, text, share * logit_scale)
        of_scale = (row_products(image, into_images).sum() * share).to(logit_scale.dtype)
        of_image = into_images.mul_(share * logit_scale).to(image.dtype)
        return of_image, of_text, of_scale.view_as(logit_scale), None


def _own_first(own: Side, everyone: Callable[[], Side], total: int) -> Iterator[Side]:
    """The columns of all ranks, this rank's first: the others' may still be on their way."""
    yield own
    assert own.first is not None
    for start, stop in ((0, own.first), (own.first + len(own), total)):
        if stop > start:
            yield everyone().part(start, stop)


def _all_sums(
    images: Side, pieces: Iterator[Side], logit_scale: Tensor, job: TileJob, kept: Kept | None
) -> tuple[Sums, Sums]:
    """Sums of this rank's images, and of the texts of all ranks."""
    of_images = Sums.empty(len(images), images.features.device)
    of_texts = Sums.empty(sum(job.counts), images.features.device)
    for columns in pieces:
        assert columns.first is not None
        some = None if kept is None else kept.part(slice(None), slice(columns.first, columns.first + len(columns)))
        row_sums, column_sums = job.tiles.sums(images, columns, logit_scale, job.regulation, True, some)
        of_images.add(row_sums)
        of_texts.add(column_sums, columns.first)
    return of_images, sums_over_ranks(of_texts, wide(images.features), job.group)


def sums_over_ranks(sums: Sums, dtype: torch.dtype, group: Group) -> Sums:
    """Log-sums over all ranks. Only numbers in [0, 1] and counts travel rounded to `dtype`."""
    if world_size(group) == 1:
        return sums
    logs = torch.stack([sums.weighted, sums.normaliser])
    top = max_over_ranks(logs.to(dtype), group).double()
    top = top.masked_fill(top == -torch.inf, 0.0)
    total = sum_over_ranks(torch.cat([(logs - top).exp(), sums.count[None]]).to(dtype), group).double()
    weighted, normaliser = total[:2].log() + top
    return Sums(weighted, normaliser, total[2])


def _sum_to_owners(
    gradients: Callable[[int, int, Tensor], None],
    job: TileJob,
    zeros: Callable[..., Tensor],
    own: Tensor,
    factor: Tensor,
) -> Tensor:
    """factor * the gradient of this rank's texts `own`, (b, d) like them.

    gradients(start, stop, into) adds this rank's part for texts start..stop. A share of every rank's texts at a time:
    one share's sum over ranks travels while the next is computed, and only that much is held in float32.
    """
    counts, world, width = job.counts, world_size(job.group), own.shape[1]
    share = -(-max(counts) // _GRADIENT_PARTS)
    if world == 1 and own.dtype == factor.dtype:
        share = counts[0]
    sums: list[Tensor] = []
    arriving: Callable[[], Tensor] | None = None
    for begin in range(0, max(counts), share):
        into = zeros((world, share, width))
        for owner, count in enumerate(counts):
            start, length = sum(counts[:owner]) + begin, min(share, count - begin)
            if length > 0:
                gradients(start, start + length, into[owner, :length])
        if arriving is not None:
            sums.append(arriving())
        arriving = start_sum_to_owners(into.mul_(factor).to(own.dtype), job.group)
    assert arriving is not None
    sums.append(arriving())
    return (sums[0] if len(sums) == 1 else torch.cat(sums))[: counts[rank(job.group)]]
