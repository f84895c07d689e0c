"""The loss against separate keys: momentum encoders and a queue of earlier pairs, as in MoCo and ALBEF.

Keys carry no gradient and differ from the anchors of the other direction, so that each direction has its own matrix:
images against the keys of texts, texts against the keys of images. Each is computed by rows, in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from sacl_ds.distributed import Group, gather_rows, rank, row_counts, world_size
from sacl_ds.losses.distillation import expected_keys
from sacl_ds.losses.regulation import Regulation
from sacl_ds.losses.streaming import Tiles, least_kept, row_products, shared_ids, without_autocast
from sacl_ds.losses.tiles import Kept, Side, Sums, wide


@dataclass(frozen=True)
class Keys:
    """What the anchors are compared with, without gradient.

    image, text: (b, d) features of this rank's pairs, from momentum encoders. queue_image, queue_text: (m, d) features
    of earlier pairs, the same on all ranks, or None; with them queue_teacher_image, queue_teacher_text (m, d_t) where
    there is a teacher, and queue_ids (m,) or (m, k) int64 where the pairs have ids. All L2-normalised.

    regulate_queue: whether the queue's negatives are weighted, together with the batch's; else each weighs
    negative_mass, and the weights of the batch's negatives have their mean by themselves. The paper leaves this open.
    """

    image: Tensor
    text: Tensor
    queue_image: Tensor | None = None
    queue_text: Tensor | None = None
    queue_teacher_image: Tensor | None = None
    queue_teacher_text: Tensor | None = None
    queue_ids: Tensor | None = None
    regulate_queue: bool = True

    def check(self, image: Tensor, teacher: bool, pair_ids: Tensor | None) -> None:
        """ValueError for what does not fit to image (b, d), to a teacher and to pair_ids."""
        if self.image.shape != image.shape or self.text.shape != image.shape:
            raise ValueError(
                f"keys must be {tuple(image.shape)} like image and text, got {tuple(self.image.shape)} and "
                f"{tuple(self.text.shape)}"
            )
        if (self.queue_image is None) != (self.queue_text is None):
            raise ValueError("queue_image and queue_text come together or not at all")
        if self.queue_image is None or self.queue_text is None:
            return
        if self.queue_image.shape != self.queue_text.shape or self.queue_image.shape[1:] != image.shape[1:]:
            raise ValueError(
                f"queue_image and queue_text must be (m, {image.shape[1]}) alike, got {tuple(self.queue_image.shape)} "
                f"and {tuple(self.queue_text.shape)}"
            )
        if teacher and self.regulate_queue and (self.queue_teacher_image is None or self.queue_teacher_text is None):
            raise ValueError("a regulated queue beside a teacher needs queue_teacher_image and queue_teacher_text")
        if (pair_ids is None) != (self.queue_ids is None):
            raise ValueError("pair_ids and queue_ids come together or not at all: they exclude pairs from one another")


@dataclass(frozen=True)
class Direction:
    """One direction's matrix. anchors: this rank's. momentum: (b, d) the same pairs' features from the momentum encoder
    of the anchors' side. batch: the keys of all ranks, in rank order. queue: those of earlier pairs."""

    anchors: Side
    momentum: Tensor
    batch: Side
    queue: Side | None

    def without_teacher(self) -> Direction:
        queue = None if self.queue is None else replace(self.queue, teacher=None)
        anchors, batch = replace(self.anchors, teacher=None), replace(self.batch, teacher=None)
        return Direction(anchors, self.momentum, batch, queue)


def keys_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    pair_ids: Tensor | None,
    keys: Keys,
    regulation: Regulation,
    make_tiles: Callable[[Regulation], Tiles],
    group: Group,
    soft_weight: float = 0.0,
    counts: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (0-dim) and losses of this rank's anchors, (b,) of images and of texts."""
    counts = row_counts(image, group) if counts is None else counts

    def losses(anchor: Tensor, direction: Direction) -> Tensor:
        hard = _row_losses(anchor, logit_scale, direction, regulation, keys.regulate_queue, make_tiles)
        if soft_weight == 0:
            return hard
        even, plain = hard, Regulation(sharpness=0.0)
        if not regulation.plain:
            even = _row_losses(anchor, logit_scale, direction.without_teacher(), plain, True, make_tiles)
        return (1 - soft_weight) * hard + soft_weight * _soft_losses(even, anchor, logit_scale, direction)

    directions = _directions(image, text, teacher if regulation.teacher else None, pair_ids, keys, counts, group)
    of_images, of_texts = (losses(*pair) for pair in zip((image, text), directions, strict=True))
    share = 0.5 * world_size(group) / sum(counts)
    return (of_images + of_texts).sum() * share, of_images.detach(), of_texts.detach()


def _directions(
    image: Tensor,
    text: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    pair_ids: Tensor | None,
    keys: Keys,
    counts: list[int],
    group: Group,
) -> tuple[Direction, Direction]:
    """Images against the keys of texts, texts against those of images."""
    start, b = sum(counts[: rank(group)]), len(image)
    ids = shared = None
    if pair_ids is not None:
        every = gather_rows(pair_ids.view(b, -1), counts, group)
        if keys.queue_ids is not None:
            every = torch.cat([every, keys.queue_ids.view(-1, every.shape[1])])
        ids, shared = shared_ids(every)

    def side(features: Tensor, of_teacher: Tensor | None, begin: int, first: int | None) -> Side:
        some_ids, some_shared = (None if x is None else x[begin : begin + len(features)] for x in (ids, shared))
        theirs = None if of_teacher is None else of_teacher.detach()
        return Side(features.detach(), theirs, some_ids, some_shared, first)

    def direction(
        anchor: Tensor,
        momentum: Tensor,
        key: Tensor,
        mine: Tensor | None,
        theirs: Tensor | None,
        queue: Tensor | None,
        old: Tensor | None,
    ) -> Direction:
        everyones_teacher = None if theirs is None else gather_rows(theirs, counts, group)
        batch = side(gather_rows(key, counts, group), everyones_teacher, 0, 0)
        earlier = None if queue is None else side(queue, None if theirs is None else old, sum(counts), None)
        return Direction(side(anchor, mine, start, start), momentum.detach(), batch, earlier)

    t_image, t_text = teacher or (None, None)
    return (
        direction(image, keys.image, keys.text, t_image, t_text, keys.queue_text, keys.queue_teacher_text),
        direction(text, keys.text, keys.image, t_text, t_image, keys.queue_image, keys.queue_teacher_image),
    )


def _row_losses(
    anchor: Tensor,
    logit_scale: Tensor,
    direction: Direction,
    regulation: Regulation,
    regulate_queue: bool,
    make_tiles: Callable[[Regulation], Tiles],
) -> Tensor:
    """(b,) losses against the keys, differentiable in anchor and logit_scale."""
    dtype = make_tiles(regulation).dtype(anchor)
    queue = None if direction.queue is None else direction.queue.to(dtype)
    sides = direction.anchors.to(dtype), direction.batch.to(dtype), queue
    return _RowLoss.apply(
        anchor, logit_scale, _Rows(*sides, logit_scale.detach(), regulation, regulate_queue, make_tiles)
    )


def _soft_losses(even: Tensor, anchor: Tensor, logit_scale: Tensor, direction: Direction) -> Tensor:
    """(b,) cross-entropies with the momentum model's distribution over the candidates.

    even: (b,) InfoNCE of the same anchors against the same keys.
    """
    dtype = wide(anchor)
    first = direction.anchors.first
    assert first is not None
    momentum = replace(direction.anchors, features=direction.momentum, teacher=None).to(dtype)
    sides = [side.to(dtype) for side in (direction.batch, direction.queue) if side is not None]
    own = sides[0].features[first : first + len(anchor)]
    towards = own - expected_keys(momentum, sides, logit_scale.detach())
    return even + logit_scale * (anchor.to(dtype) * towards).sum(1)


class _Rows:
    """Losses of anchors against the keys of the batch and of the queue, and what their gradient needs."""

    def __init__(
        self,
        anchors: Side,
        batch: Side,
        queue: Side | None,
        logit_scale: Tensor,
        regulation: Regulation,
        regulate_queue: bool,
        make_tiles: Callable[[Regulation], Tiles],
    ) -> None:
        self.anchors, self.logit_scale = anchors, logit_scale
        assert anchors.first is not None
        own_keys = batch.part(anchors.first, anchors.first + len(anchors))
        even = replace(regulation, alpha=0.0, sharpness=0.0, drop_below=None)
        # parts of the keys whose weights have their mean together, and the regulation of each
        self.parts: list[tuple[list[Side], Tiles, Regulation]] = [([batch], make_tiles(regulation), regulation)]
        if queue is not None and regulate_queue:
            self.parts[0][0].append(queue)
        elif queue is not None:
            self.parts.append(([queue], make_tiles(even), even))
        own = row_products(anchors.features, own_keys.features) * logit_scale.double()
        self.kept: list[Kept | None] = []
        offsets, totals = [], []
        for sides, tiles, of_part in self.parts:
            sums = self._sums(sides, tiles, None)
            offset = torch.full_like(own, math.log(regulation.negative_mass))
            kept = None
            if of_part.drop_below is not None:
                least = least_kept(sums, of_part)
                kept = Kept(least, least.new_empty(0))
                sums = self._sums(sides, tiles, kept)
            elif not of_part.even:
                offset = offset + sums.count.log() - sums.normaliser
            self.kept.append(kept)
            offsets.append(offset.masked_fill(sums.count == 0, -torch.inf))
            totals.append((offsets[-1] + sums.weighted).masked_fill(sums.count == 0, -torch.inf))
        regulated = torch.stack(totals).logsumexp(0)
        margin = regulated - own
        self.loss, self.pull = softplus(margin, threshold=80.0), margin.sigmoid()
        none = regulated == -torch.inf
        self.shifts = [(logsigmoid(margin) + offset - regulated).masked_fill(none, -torch.inf) for offset in offsets]

    def _sums(self, sides: list[Side], tiles: Tiles, kept: Kept | None) -> Sums:
        total = Sums.empty(len(self.anchors), self.anchors.features.device)
        for side in sides:
            total.add(tiles.sums(self.anchors, side, self.logit_scale, False, kept)[0])
        return total

    def gradient(self, upstream: Tensor) -> Tensor:
        """(b, d): of sum(upstream * losses) by the logits, times the keys; not yet times logit_scale."""
        features = self.anchors.features
        into = torch.zeros_like(features, dtype=wide(features))
        for (sides, tiles, _), kept, shift in zip(self.parts, self.kept, self.shifts, strict=True):
            for side in sides:
                tiles.gradients(self.anchors, side, self.logit_scale, shift, None, -self.pull, into, None, kept)
        return into.mul_(upstream.to(into.dtype)[:, None])


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logit_scale: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(anchor, logit_scale)
        return rows.loss.to(wide(anchor))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        anchor, logit_scale = ctx.saved_tensors
        into = ctx.rows.gradient(upstream)
        of_scale = row_products(anchor, into).sum().to(logit_scale.dtype)
        return into.mul_(logit_scale).to(anchor.dtype), of_scale.view_as(logit_scale), None
