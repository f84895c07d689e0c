"""Loss against separate keys, from momentum encoders and a queue of earlier pairs, and soft targets (MoCo, ALBEF).

Keys carry no gradient and differ from the anchors of the other direction, so that each direction has its own matrix:
images against the keys of texts, texts against the keys of images. Each is computed by rows, in tiles.

Soft targets are the momentum model's. For image anchor i with keys k_j, the candidates C(i) are its own key and its
negatives' (pairs that share an id with i are neither), v_i' is the momentum model's feature of image i, and the logit
scale the trained model's, constant in q:

    q_ij = softmax over C(i) of logit_scale * <v_i', k_j>         p_ij = softmax over C(i) of z_ij
    S_i  = -sum_j q_ij log p_ij = L_i + z_ii - logit_scale * <v_i, kappa_i>,    kappa_i = sum_j q_ij k_j

with L_i InfoNCE against the same keys. So all that soft targets add is kappa_i, one vector an anchor, which needs no
gradient: an attention over the candidates, summed up tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from sacl_ds.losses.regulated import (
    ContrastiveOutput,
    Regulation,
    anchor_losses,
    log_weights_of,
    negatives_in_batch,
)
from sacl_ds.losses.streaming import GlobalBatch, TileJob, exactly_once, ids_by_column, least_kept, normalised
from sacl_ds.losses.tiles import Excluded, Kept, Side, Sums, constant, row_products, tiles_of, wide


@dataclass(frozen=True)
class Keys:
    """Keys that the anchors are compared with, without gradient.

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

    @property
    def kind(self) -> str:
        """Description, in words, of those properties of the queue that must be the same on all ranks."""
        if self.queue_image is None:
            return "without a queue"
        return f"with a queue of {len(self.queue_image)}, {'' if self.regulate_queue else 'not '}regulated"

    def check(self, image: Tensor, teacher: bool, pair_ids: Tensor | None) -> None:
        """Raise ValueError where the keys do not fit to image (b, d), to a teacher and to pair_ids."""
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
        if pair_ids is not None and self.queue_ids is not None:
            columns, m = ids_by_column(pair_ids).shape[1], len(self.queue_text)
            if self.queue_ids.ndim not in (1, 2) or ids_by_column(self.queue_ids).shape != (m, columns):
                raise ValueError(
                    f"queue_ids must be ({m}, {columns}) like the queue and pair_ids, got {tuple(self.queue_ids.shape)}"
                )


class Modality(NamedTuple):
    """The images of all pairs, or their texts. features, momentum: (b, d) this rank's, of the trained model and of the
    momentum model; teacher: (b, d_t). keys: (N, d) of the momentum model, of all ranks; teacher_keys: (N, d_t) of the
    teacher. queue: (m, d); queue_teacher: (m, d_t)."""

    features: Tensor
    momentum: Tensor
    teacher: Tensor | None
    keys: Tensor
    teacher_keys: Tensor | None
    queue: Tensor | None
    queue_teacher: Tensor | None


def modalities(batch: GlobalBatch, keys: Keys) -> tuple[Modality, Modality]:
    """Pair images and texts with their keys. batch: has sent `key_image`, `key_text` and the teacher's of both."""
    image, text = batch.teacher or (None, None)
    images, texts = (batch["key_image"], batch.get("teacher_image")), (batch["key_text"], batch.get("teacher_text"))
    return (
        Modality(batch.image, keys.image, image, *images, keys.queue_image, keys.queue_teacher_image),
        Modality(batch.text, keys.text, text, *texts, keys.queue_text, keys.queue_teacher_text),
    )


def dense_keys_loss(
    batch: GlobalBatch, logit_scale: Tensor, keys: Keys, soft_weight: float, regulation: Regulation
) -> ContrastiveOutput:
    """`regulated.dense_loss` against separate keys, and with soft targets: the specification of `keys_loss`."""
    dtype, start = batch.image.dtype, batch.start
    negatives = negatives_in_batch(batch)
    b, n = negatives.shape
    if keys.queue_text is not None:
        earlier = negatives.new_ones(b, len(keys.queue_text))
        if batch.ids is not None and keys.queue_ids is not None:
            mine, theirs = batch.ids[start : start + b], ids_by_column(keys.queue_ids)
            earlier = ~(mine[:, None] == theirs[None]).any(-1)
        negatives = torch.cat([negatives, earlier], 1)

    def losses(anchor: Modality, key: Modality) -> tuple[Tensor, Tensor]:
        columns = torch.cat([key.keys] + ([] if key.queue is None else [key.queue])).detach().to(dtype)
        cosine = anchor.features @ columns.T
        of_teacher = None
        if anchor.teacher is not None and key.teacher_keys is not None:
            theirs = [key.teacher_keys]
            if key.queue is not None:  # an unregulated queue needs no teacher: any similarity does
                blank = key.teacher_keys.new_zeros(len(key.queue), key.teacher_keys.shape[1])
                theirs.append(blank if key.queue_teacher is None else key.queue_teacher)
            of_teacher = anchor.teacher @ torch.cat(theirs).to(dtype).T
        log_similarity = regulation.log_similarity(cosine.detach(), of_teacher)
        together = [negatives] if keys.regulate_queue else list(negatives.split([n, negatives.shape[1] - n], 1))
        regulated, least = log_weights_of(log_similarity[:, : together[0].shape[1]], together[0], regulation)
        log_weights = [regulated]
        if len(together) > 1:
            log_weights.append(torch.zeros_like(cosine[:, n:]).masked_fill(~together[1], -torch.inf))
        every = torch.cat(log_weights, 1) + math.log(regulation.negative_mass)
        logits = cosine * logit_scale.to(dtype)
        hard = anchor_losses(logits, every, start)
        if soft_weight == 0:
            return hard, least
        believed = anchor.momentum.detach().to(dtype) @ columns.T * logit_scale.detach().to(dtype)
        return (1 - soft_weight) * hard + soft_weight * _dense_soft_losses(logits, believed, negatives, start), least

    image, text = modalities(batch, keys)
    (of_images, least_images), (of_texts, least_texts) = losses(image, text), losses(text, image)
    return ContrastiveOutput(
        (of_images + of_texts).sum() * batch.share,
        of_images.detach(),
        of_texts.detach(),
        None if regulation.drop_below is None else (least_images, least_texts),
    )


def _dense_soft_losses(logits: Tensor, believed: Tensor, negatives: Tensor, start: int) -> Tensor:
    """(rows,) cross-entropy of softmax(logits) with softmax(believed) as its target, over each anchor's own key and its
    negatives; (rows, m) all."""
    candidates = negatives.clone()
    candidates.diagonal(start).fill_(True)
    q = believed.masked_fill(~candidates, -torch.inf).softmax(1)
    log_p = logits.masked_fill(~candidates, -torch.inf).log_softmax(1)
    return -(q * log_p.masked_fill(~candidates, 0.0)).sum(1)


def keys_loss(logit_scale: Tensor, keys: Keys, soft_weight: float, job: TileJob) -> ContrastiveOutput:
    """Compute the differentiable loss. job: with the queue's ids, and a batch as in `modalities`."""

    def losses(anchor: Modality, key: Modality) -> tuple[Tensor, Tensor | None]:
        direction = _direction(anchor, key, job)
        hard, least = _row_losses(anchor.features, logit_scale, direction, keys.regulate_queue, job)
        if soft_weight == 0:
            return hard, least
        even = hard
        if not job.regulation.plain:
            plain = replace(job, regulation=Regulation(sharpness=0.0))
            even = _row_losses(anchor.features, logit_scale, direction.without_teacher(), True, plain)[0]
        soft = _soft_losses(even, anchor, logit_scale, direction)
        return (1 - soft_weight) * hard + soft_weight * soft, least

    image, text = modalities(job.batch, keys)
    (of_images, least_images), (of_texts, least_texts) = losses(image, text), losses(text, image)
    least = None if least_images is None or least_texts is None else (least_images, least_texts)
    return ContrastiveOutput(
        (of_images + of_texts).sum() * job.batch.share, of_images.detach(), of_texts.detach(), least
    )


@dataclass(frozen=True)
class Direction:
    """Matrix of one direction. anchors: this rank's. batch: the keys of all ranks, in rank order. queue: those of
    earlier pairs."""

    anchors: Side
    batch: Side
    queue: Side | None

    @property
    def keys(self) -> list[Side]:
        return [self.batch] if self.queue is None else [self.batch, self.queue]

    def to(self, dtype: torch.dtype) -> Direction:
        return Direction(
            self.anchors.to(dtype), self.batch.to(dtype), None if self.queue is None else self.queue.to(dtype)
        )

    def without_teacher(self) -> Direction:
        queue = None if self.queue is None else replace(self.queue, teacher=None)
        return Direction(replace(self.anchors, teacher=None), replace(self.batch, teacher=None), queue)


def _direction(anchor: Modality, key: Modality, job: TileJob) -> Direction:
    def side(features: Tensor, of_teacher: Tensor | None, begin: int, first: int | None) -> Side:
        theirs = None if of_teacher is None else constant(of_teacher)
        return Side(constant(features), theirs, *job.ids_of(begin, len(features)), first)

    start, queue = job.batch.start, None
    if key.queue is not None:
        queue = side(key.queue, None if key.teacher is None else key.queue_teacher, len(key.keys), None)
    return Direction(side(anchor.features, anchor.teacher, start, start), side(key.keys, key.teacher_keys, 0, 0), queue)


def _row_losses(
    anchor: Tensor, logit_scale: Tensor, direction: Direction, regulate_queue: bool, job: TileJob
) -> tuple[Tensor, Tensor | None]:
    """(b,) losses against the keys, differentiable in anchor and logit_scale; and the least r that drop_below keeps."""
    direction = direction.to(job.tiles.feature_dtype(anchor))
    rows = _Rows(direction, logit_scale.detach(), regulate_queue, job)
    return _RowLoss.apply(anchor, logit_scale, rows), None if rows.kept[0] is None else rows.kept[0].rows


def _soft_losses(even: Tensor, anchor: Modality, logit_scale: Tensor, direction: Direction) -> Tensor:
    """(b,) cross-entropies with the momentum model's distribution over the candidates.

    even: (b,) InfoNCE of the same anchors against the same keys.
    """
    dtype = wide(anchor.features)
    first = direction.anchors.first
    assert first is not None
    momentum = replace(direction.anchors, features=anchor.momentum.detach(), teacher=None).to(dtype)
    sides = direction.to(dtype).keys
    own = sides[0].features[first : first + len(anchor.features)]
    towards = own - expected_keys(momentum, sides, logit_scale.detach())
    return even + logit_scale * (anchor.features.to(dtype) * towards).sum(1)


@torch.no_grad()
def expected_keys(anchors: Side, keys: Sequence[Side], logit_scale: Tensor) -> Tensor:
    """(b, d) kappa_i: the mean key of each anchor's candidates under the momentum model's softmax.

    anchors: (b, d) momentum features of this rank's pairs; keys: the global batch's, which hold the anchors' own at
    anchors.first, and perhaps a queue's. Float32 or float64, alike. No more than a tile of logits is held.
    """
    assert anchors.first is not None
    own = keys[0].part(anchors.first, anchors.first + len(anchors)).features
    # of the candidates so far, the own key the first: the highest logit, and relative to it the softmax's sums
    highest = logit_scale * (anchors.features * own).sum(1)
    total, weighted = torch.ones_like(highest), own.clone()
    for side in keys:
        for i, _, row, column in tiles_of(anchors, side):
            part = slice(i, i + len(row))
            logits = (row.features @ column.features.T).mul_(logit_scale)
            Excluded(row, column).fill(logits, -torch.inf)
            top = torch.maximum(highest[part], logits.amax(1))
            shrink = (highest[part] - top).exp_()
            weights = logits.sub_(top[:, None]).exp_()
            total[part] = total[part] * shrink + weights.sum(1)
            weighted[part] = torch.addmm(weighted[part] * shrink[:, None], weights, column.features)
            highest[part] = top
    return weighted.div_(total[:, None])


class _Rows:
    """Losses of anchors against the keys of the batch and of the queue, and what their gradient needs."""

    def __init__(self, direction: Direction, logit_scale: Tensor, regulate_queue: bool, job: TileJob) -> None:
        self.anchors, self.keys = direction.anchors, direction.keys
        self.logit_scale, self.tiles = logit_scale, job.tiles
        first = self.anchors.first
        assert first is not None
        own_keys = direction.batch.part(first, first + len(self.anchors))
        # parts of the keys whose weights have their mean together, and the regulation of each
        self.parts: list[tuple[list[Side], Regulation]] = [(direction.keys, job.regulation)]
        if direction.queue is not None and not regulate_queue:
            even = replace(job.regulation, alpha=0.0, sharpness=0.0, drop_below=None)
            self.parts = [([direction.batch], job.regulation), ([direction.queue], even)]
        own = row_products(self.anchors.features, own_keys.features) * logit_scale.double()
        self.kept: list[Kept | None] = []
        offsets, totals = [], []
        for sides, regulation in self.parts:
            sums = self._sums(sides, regulation, None)
            offset = torch.full_like(own, math.log(regulation.negative_mass))
            kept = None
            if regulation.drop_below is None:
                offset = normalised(offset, sums, regulation)
            else:
                least = least_kept(sums, regulation)
                kept = Kept(least, least.new_empty(0))
                sums = self._sums(sides, regulation, kept)
            self.kept.append(kept)
            offsets.append(offset.masked_fill(sums.count == 0, -torch.inf))
            totals.append((offsets[-1] + sums.weighted).masked_fill(sums.count == 0, -torch.inf))
        regulated = torch.stack(totals).logsumexp(0)
        margin = regulated - own
        self.loss, self.pull = softplus(margin, threshold=80.0), margin.sigmoid()
        none = regulated == -torch.inf
        self.shifts = [(logsigmoid(margin) + offset - regulated).masked_fill(none, -torch.inf) for offset in offsets]

    def _sums(self, sides: list[Side], regulation: Regulation, kept: Kept | None) -> Sums:
        total = Sums.empty(len(self.anchors), self.anchors.features.device)
        for side in sides:
            total.add(self.tiles.sums(self.anchors, side, self.logit_scale, regulation, False, kept)[0])
        return total

    def gradient(self, upstream: Tensor) -> Tensor:
        """Return (b, d): the gradient of sum(upstream * losses) in the logits, times the keys; not yet times
        logit_scale."""
        features = self.anchors.features
        into = torch.zeros_like(features, dtype=wide(features))
        for (sides, regulation), kept, shift in zip(self.parts, self.kept, self.shifts, strict=True):
            for side in sides:
                self.tiles.gradients(
                    self.anchors, side, self.logit_scale, regulation, (shift, None), -self.pull, (into, None), kept
                )
        return into.mul_(upstream.to(into.dtype)[:, None])


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logit_scale: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        # for their shapes; and those that backward compares again, to notice changes in place
        compared = [x for side in (rows.anchors, *rows.keys) for x in side.compared]
        ctx.save_for_backward(anchor, logit_scale, *compared)
        return rows.loss.to(wide(anchor))

    @staticmethod
    @exactly_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        anchor, logit_scale, *_ = ctx.saved_tensors
        into = ctx.rows.gradient(upstream)
        of_scale = row_products(anchor, into).sum().to(logit_scale.dtype)
        return into.mul_(logit_scale).to(anchor.dtype), of_scale.view_as(logit_scale), None
