"""Regulated loss in one pass over tiles, without the (pairs of this rank) x (global batch) matrix.

With r_ij = -log s_ij, n_i = |Neg(i)|, A_i = logsumexp_j (z_ij + r_ij) and B_i = logsumexp_j r_ij over Neg(i):

    X_i = log(mass * n_i) + A_i - B_i        L_i = softplus(X_i - z_ii)
    dL_i / dz_ij = p_i e^(z_ij + r_ij - A_i)   for negatives,   -p_i on the diagonal,   p_i = sigmoid(X_i - z_ii)

s_ij is the same for image anchor i and text anchor j, so that one tile of images x texts serves both: its row sums are
the images' own, its column sums are parts of the texts', which the ranks add up. Only texts (and the teacher's) are
gathered, and only the texts' gradient is sent back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, softplus

from sacl_ds.distributed import (
    Group,
    differentiable_once,
    fingerprint,
    gather_rows,
    gather_rows_with_grad,
    max_over_ranks,
    rank,
    reduce_scatter_async,
    require_alike,
    row_counts,
    start_gather_rows,
    sum_over_ranks,
    world_size,
)
from sacl_ds.losses.regulated import ContrastiveOutput, Regulation
from sacl_ds.losses.tiles import Kept, Side, Sums, constant, row_products, wide

_GRADIENT_PARTS = 4  # in which the texts' gradient is sent: one travels while the next is computed


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
class GlobalBatch:
    """This rank's b pairs, and what is known of the N pairs of all ranks. Losses gather features here alone.

    image, text: (b, d) this rank's features; teacher: its (b, d_t) features of both. counts: pairs of each rank; start:
    position of this rank's first. ids: (N, k) int64, or None. Further rows of all ranks, (N, ...) in rank order, by
    the name under which they were sent: `batch["text"]` waits for them, `batch.get` gives None for what was not sent.
    """

    image: Tensor
    text: Tensor
    teacher: tuple[Tensor, Tensor] | None
    counts: list[int]
    start: int
    group: Group
    ids: Tensor | None
    sent: dict[str, Tensor | Callable[[], Tensor]]

    @classmethod
    def gather(
        cls,
        features: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor] | None,
        pair_ids: Tensor | None,
        group: Group,
        rows: dict[str, Tensor | None],
        counts: list[int] | None = None,
        with_grad: bool = False,
        alike: Mapping[str, object] | None = None,
    ) -> GlobalBatch:
        """Ask all ranks of `group`, which all call it. rows: (b, ...) to be sent by name; with_grad: and sent back.

        counts: where they are known, on all ranks or on none. Else the ranks exchange them, and compare what is to be
        sent, and alike (`row_counts`). With counts these travel with the ids, so that no collective is added, and are
        compared, for which the host waits, where there are ids and alike. Raises ValueError on every rank where no rank
        has a pair.
        """
        image, text = features
        own_ids = None if pair_ids is None else ids_by_column(pair_ids)
        settings = {**(alike or {}), "pair_ids": None if own_ids is None else f"{own_ids.shape[1]} a pair"}
        for name, each in rows.items():
            if each is not None and each.ndim > 1:
                settings[f"the width and type of {name}"] = each.shape[1], each.dtype
        known = counts is not None
        counts = row_counts(image, group, settings) if counts is None else counts
        if not any(counts):
            raise ValueError("there are no pairs: the batch of every rank is empty")
        ids = own_ids
        if own_ids is not None and world_size(group) > 1:
            head = own_ids.new_full((int(known), own_ids.shape[1]), fingerprint(settings))
            sent_counts = [count + int(known) for count in counts]
            parts = gather_rows(torch.cat([head, own_ids]), sent_counts, group).split(sent_counts)
            ids = torch.cat([part[int(known) :] for part in parts])
            if known and alike is not None:
                require_alike(torch.stack([part[0, 0] for part in parts]).tolist(), settings, group)
        send = gather_rows_with_grad if with_grad else start_gather_rows
        sent = {name: send(each, counts, group) for name, each in rows.items() if each is not None}
        return cls(image, text, teacher, counts, sum(counts[: rank(group)]), group, ids, sent)

    def __getitem__(self, name: str) -> Tensor:
        rows = self.sent[name]
        return rows if isinstance(rows, Tensor) else rows()

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.sent else None

    @property
    def share(self) -> float:
        """Loss scale 0.5 * world / global batch; data-parallel averaging then gives the mean over the global batch."""
        return 0.5 * len(self.counts) / sum(self.counts)


@dataclass(frozen=True)
class TileJob:
    """Inputs shared by every pass over the tiles. ids, shared: of the batch and then of a queue, from `shared_ids`."""

    batch: GlobalBatch
    regulation: Regulation
    tiles: Tiles
    ids: Tensor | None = None
    shared: Tensor | None = None

    @classmethod
    def of(cls, batch: GlobalBatch, regulation: Regulation, tiles: Tiles, queue_ids: Tensor | None = None) -> TileJob:
        ids = batch.ids
        if ids is None:
            return cls(batch, regulation, tiles)
        if queue_ids is not None:
            ids = torch.cat([ids, ids_by_column(queue_ids)])
        return cls(batch, regulation, tiles, *shared_ids(ids))

    def ids_of(self, start: int, length: int) -> tuple[Tensor | None, Tensor | None]:
        """Slice the ids and the mask of shared ones: `length` pairs from `start` on."""
        part = slice(start, start + length)
        return (None, None) if self.ids is None or self.shared is None else (self.ids[part], self.shared[part])

    def side(self, features: Tensor, teacher: Tensor | None, start: int) -> Side:
        """Make a side of the pairs from `start` of the global batch on, in the dtype of the tiles."""
        dtype = self.tiles.feature_dtype(features)
        teacher = None if teacher is None else constant(teacher.to(dtype))
        return Side(constant(features.to(dtype)), teacher, *self.ids_of(start, len(features)), start)


@dataclass(frozen=True)
class Joint:
    """Results of the forward pass of the joint form that its backward pass needs.

    images, image_anchors: this rank's; texts, text_anchors: those of all ranks, in rank order. kept: the bounds of
    drop_below, for both.
    """

    job: TileJob
    images: Side
    texts: Side
    logit_scale: Tensor
    kept: Kept | None
    image_anchors: Anchors
    text_anchors: Anchors

    @cached_property
    def own(self) -> Anchors:
        """This rank's texts as anchors."""
        return self.text_anchors.part(self.job.batch.start, len(self.job.batch.text))


def joint_loss(logit_scale: Tensor, job: TileJob) -> tuple[ContrastiveOutput, Joint]:
    """Compute the differentiable loss and its forward pass.

    job: whose batch has sent `text`, `teacher_text` where there is a teacher, and `cosine`, of each image with its
    text, (b,). The gradient that comes into the loss must be the same on all ranks.
    """
    batch = job.batch
    with torch.no_grad():
        joint = _measure(logit_scale.detach(), job)
    loss = _JointLoss.apply(batch.image, batch.text, logit_scale, joint)
    of_images, of_texts = (anchors.loss.to(loss.dtype) for anchors in (joint.image_anchors, joint.own))
    least = None
    if joint.kept is not None:
        least = joint.kept.rows, joint.kept.columns[batch.start : batch.start + len(batch.text)]
    return ContrastiveOutput(loss, of_images, of_texts, least), joint


def ids_by_column(ids: Tensor) -> Tensor:
    """Reshape (n,) or (n, k) ids to (n, k); n may be 0."""
    return ids if ids.ndim == 2 else ids[:, None]


def shared_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Renumber ids (n, k) from 0 column by column; and mark, (n,) bool, rows that share any id with another."""
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
        """Finish the anchors' sums. own: (n,) float64, z of each positive. Without negatives loss and pull are 0."""
        alone = sums.count == 0
        regulated = math.log(regulation.negative_mass) + sums.weighted
        if regulation.drop_below is None:
            regulated = normalised(regulated, sums, regulation)
        margin = (regulated - own).masked_fill(alone, -torch.inf)
        shift = (logsigmoid(margin) - sums.weighted).masked_fill(alone, -torch.inf)
        return cls(margin, softplus(margin, threshold=80.0), margin.sigmoid(), shift)

    def part(self, start: int, length: int) -> Anchors:
        return Anchors(*(x[start : start + length] for x in (self.margin, self.loss, self.pull, self.shift)))


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


def _measure(logit_scale: Tensor, job: TileJob) -> Joint:
    """Run the forward pass: sums over tiles, anchors. This rank's texts come first: the others' may be on their way."""
    batch, regulation = job.batch, job.regulation
    teacher_image, teacher_text = batch.teacher or (None, None)
    images, own_texts = (
        job.side(features, teacher, batch.start)
        for features, teacher in ((batch.image, teacher_image), (batch.text, teacher_text))
    )

    @cache
    def texts() -> Side:
        return job.side(batch["text"], batch.get("teacher_text"), 0)

    def sums(kept: Kept | None = None) -> tuple[Sums, Sums]:
        return _all_sums(images, _own_first(own_texts, texts, sum(batch.counts)), logit_scale, job, kept)

    of_images, of_texts = sums()
    kept = None
    if regulation.drop_below is not None:
        kept = Kept(least_kept(of_images, regulation), least_kept(of_texts, regulation))
        of_images, of_texts = sums(kept)
    positive = batch["cosine"].double() * logit_scale.double()
    mine = positive[batch.start : batch.start + len(batch.image)]
    return Joint(
        job,
        images,
        texts(),
        logit_scale,
        kept,
        Anchors.of(of_images, mine, regulation),
        Anchors.of(of_texts, positive, regulation),
    )


def exactly_once(
    backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
) -> Callable[[Any, Tensor], tuple[Tensor | None, ...]]:
    """Run a backward pass outside autocast, where products keep their types; refuse to be differentiated twice."""

    @wraps(backward)
    def exact(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(upstream.device.type, enabled=False):
            return backward(ctx, upstream)

    return differentiable_once(exact)


class _JointLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, joint: Joint) -> Tensor:
        ctx.joint = joint
        # for their shapes; and those that backward compares again, to notice changes in place
        compared = joint.images.compared + joint.texts.compared
        ctx.save_for_backward(image, text, logit_scale, *compared)
        total = (joint.image_anchors.loss + joint.own.loss).sum() * joint.job.batch.share
        return total.to(wide(image))

    @staticmethod
    @exactly_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        joint: Joint = ctx.joint
        image, text, logit_scale, *_ = ctx.saved_tensors
        own = -(joint.image_anchors.pull + joint.own.pull)
        into_images = torch.zeros_like(image, dtype=wide(image))
        text_shift = joint.text_anchors.shift.to(into_images.dtype)

        def gradients(start: int, stop: int, into_texts: Tensor) -> None:
            kept = None if joint.kept is None else joint.kept.part(slice(None), slice(start, stop))
            shifts = joint.image_anchors.shift, text_shift[start:stop]
            columns, into = joint.texts.part(start, stop), (into_images, into_texts)
            joint.job.tiles.gradients(
                joint.images, columns, joint.logit_scale, joint.job.regulation, shifts, own, into, kept
            )

        share = upstream * joint.job.batch.share
        of_text = _reduce_scatter_shares(gradients, joint.job.batch, into_images.new_zeros, text, share * logit_scale)
        of_scale = (row_products(image, into_images).sum() * share).to(logit_scale.dtype)
        of_image = into_images.mul_(share * logit_scale).to(image.dtype)
        return of_image, of_text, of_scale.view_as(logit_scale), None


def _own_first(own: Side, everyone: Callable[[], Side], total: int) -> Iterator[Side]:
    """Yield the columns of all ranks, this rank's first: the others' may still be on their way."""
    yield own
    assert own.first is not None
    for start, stop in ((0, own.first), (own.first + len(own), total)):
        if stop > start:
            yield everyone().part(start, stop)


def _all_sums(
    images: Side, pieces: Iterator[Side], logit_scale: Tensor, job: TileJob, kept: Kept | None
) -> tuple[Sums, Sums]:
    """Sum over tiles: for this rank's images, and for the texts of all ranks."""
    of_images = Sums.empty(len(images), images.features.device)
    of_texts = Sums.empty(sum(job.batch.counts), images.features.device)
    for columns in pieces:
        assert columns.first is not None
        some = None if kept is None else kept.part(slice(None), slice(columns.first, columns.first + len(columns)))
        row_sums, column_sums = job.tiles.sums(images, columns, logit_scale, job.regulation, True, some)
        of_images.add(row_sums)
        of_texts.add(column_sums, columns.first)
    return of_images, sums_over_ranks(of_texts, wide(images.features), job.batch.group)


def sums_over_ranks(sums: Sums, dtype: torch.dtype, group: Group) -> Sums:
    """Reduce log-sums over all ranks. Only numbers in [0, 1] and counts travel rounded to `dtype`."""
    if world_size(group) == 1:
        return sums
    logs = torch.stack([sums.weighted, sums.normaliser])
    top = max_over_ranks(logs.to(dtype), group).double()
    top = top.masked_fill(top == -torch.inf, 0.0)
    total = sum_over_ranks(torch.cat([(logs - top).exp(), sums.count[None]]).to(dtype), group).double()
    weighted, normaliser = total[:2].log() + top
    return Sums(weighted, normaliser, total[2])


def _reduce_scatter_shares(
    gradients: Callable[[int, int, Tensor], None],
    batch: GlobalBatch,
    zeros: Callable[..., Tensor],
    own: Tensor,
    factor: Tensor,
) -> Tensor:
    """factor * the gradient of this rank's texts `own`, (b, d) like them.

    gradients(start, stop, into) adds this rank's part for texts start..stop. A share of every rank's texts at a time:
    one share's sum over ranks travels while the next is computed, and only that much is held in float32.
    """
    counts, world, width = batch.counts, len(batch.counts), own.shape[1]
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
        arriving = reduce_scatter_async(into.mul_(factor).to(own.dtype), batch.group)
    assert arriving is not None
    sums.append(arriving())
    return (sums[0] if len(sums) == 1 else torch.cat(sums))[: len(own)]
