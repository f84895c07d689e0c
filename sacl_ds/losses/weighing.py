"""What the negatives of a global batch weigh, for records and analysis: counts and means, without the matrix.

The weights are those of the loss (`sacl_ds.losses.regulated`): w_ij with mean `negative_mass` over the negatives of
anchor i, 0 where `drop_below` removes a pair. Tiles of images x texts are gone through twice: for the normaliser of
every anchor, then for the weights themselves. Products are in float32 (float64 for float64 features), all else in
float64, whose range holds e^z without a shift: |z| is at most the logit scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sacl_ds.distributed import Group, gather_rows, row_counts, sum_over_ranks
from sacl_ds.losses import tiles as torch_tiles
from sacl_ds.losses.regulated import Regulation
from sacl_ds.losses.streaming import Job, sums_over_ranks
from sacl_ds.losses.tiles import Excluded, Side, Sums, tiles_of

EDGES = np.concatenate([[0.0], 10.0 ** (np.arange(-80, 41) / 20), [np.inf]])
"""Edges of the bins of weights, float64: 0, then 1e-4 to 1e2 with 20 bins a decade, then inf. A bin holds its lower."""
THRESHOLDS = np.arange(1, 10) / 10
"""Weights under which pairs are counted exactly."""

_BREAKS = np.union1d(EDGES[1:-1], THRESHOLDS)
_BIN_OF_PART = np.searchsorted(EDGES, np.concatenate([[0.0], _BREAKS]), side="right") - 1
_PARTS_UNDER = np.searchsorted(_BREAKS, THRESHOLDS) + 1


@dataclass(frozen=True)
class Lowest:
    """Pairs of an anchor and a negative, numpy arrays of one length, lowest weight first.

    anchor, negative: positions in the global batch, int64. weight; student, teacher: cosines, float64; teacher is NaN
    where there was none.
    """

    anchor: np.ndarray
    negative: np.ndarray
    weight: np.ndarray
    student: np.ndarray
    teacher: np.ndarray

    def __len__(self) -> int:
        return len(self.anchor)


@dataclass(frozen=True)
class Weighed:
    """The weights of one direction over the global batch, the same on all ranks.

    anchors: how many; pairs: of an anchor and one of its negatives. histogram: (bins,) int64 counts of weights between
    EDGES. under: (9,) float64, the share of weights under each of THRESHOLDS, from exact counts.

    Means over the anchors that have a negative left (NaN where none has): `effective`, the effective number of
    negatives (sum w)^2 / sum w^2; `effective_share`, that over the number of negatives; `mass`, X_i - log sum e^z, what
    the weights add to the log-sum of the negatives, in nats, negative_mass included; `shape`, KL(q || p) in nats of
    q ~ w e^z from p ~ e^z. mean_log_weight: over the pairs that are not removed.
    lowest: the pairs of least weight, ties by position; None where not asked for, empty where all weigh the same.
    """

    anchors: int
    pairs: int
    histogram: np.ndarray
    under: np.ndarray
    effective: float
    effective_share: float
    mass: float
    shape: float
    mean_log_weight: float
    lowest: Lowest | None


@torch.no_grad()
def weigh(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    pair_ids: Tensor | None = None,
    regulation: Regulation,
    group: Group = None,
    lowest: int = 0,
    tile: int = 1024,
) -> tuple[Weighed, Weighed]:
    """The weights of image anchors over texts, and of text anchors over images, in the global batch of all ranks.

    image, text: (b, d) this rank's unit features; b may differ between ranks. logit_scale: 1 / temperature, at most
    some hundred. teacher: its (b, d_t) unit features, needed where regulation.alpha > 0; without need they still give
    `Lowest.teacher`. pair_ids: (b,) or (b, k) int64; a match in any column excludes. lowest: so many pairs of least
    weight per direction. tile: rows and columns held at a time. Every rank of `group` calls it.

    Raises ValueError for a teacher's share without a teacher.
    """
    if regulation.alpha > 0 and teacher is None:
        raise ValueError(f"alpha={regulation.alpha} needs the teacher's features")
    with torch.autocast(image.device.type, enabled=False):
        job = Job.of(image, pair_ids, regulation, torch_tiles, group)
        counts = job.counts
        of_teacher = (None, None) if teacher is None else (teacher[0].detach(), gather_rows(teacher[1], counts, group))
        images = job.side(image.detach(), of_teacher[0], job.start)
        texts = job.side(gather_rows(text, counts, group), of_teacher[1], 0)
        tiles = _Tiles(images, texts, float(logit_scale), regulation, tile)
        by_image, by_text = _normalisers(tiles, job)
        image_anchors = _Direction(tiles, 1, by_image, lowest)
        text_anchors = _Direction(tiles, 0, by_text, lowest)
        for part in tiles:
            image_anchors.add(part)
            text_anchors.add(part)
        # sums of image anchors are complete here, those of text anchors in parts on all ranks
        image_anchors.sums = gather_rows(image_anchors.sums.T.contiguous(), counts, group).T
        text_anchors.sums = sum_over_ranks(text_anchors.sums, group)
        return image_anchors.weighed(group), text_anchors.weighed(group)


def quantiles(histogram: np.ndarray, qs: Sequence[float]) -> np.ndarray:
    """(len(qs),) float64: the weights that shares `qs` of the pairs do not exceed; NaN for an empty histogram.

    Interpolated in the logarithm of the weight within a bin; under EDGES[1] in the weight itself, and from EDGES[-2] on
    that edge is all that is known.
    """
    cumulative = np.cumsum(histogram)
    total = cumulative[-1]
    if total == 0:
        return np.full(len(qs), np.nan)
    wanted = np.asarray(qs, np.float64) * total
    # the first bin that reaches the count; for q = 0 the first with anything in it
    place = np.searchsorted(cumulative, np.maximum(wanted, 1e-9), side="left").clip(max=len(histogram) - 1)
    share = ((wanted - (cumulative - histogram)[place]) / histogram[place]).clip(0.0, 1.0)
    low, high = EDGES[place], EDGES[place + 1]
    inner = (place > 0) & (place < len(histogram) - 1)
    result = np.where(place == 0, share * EDGES[1], EDGES[-2])
    result[inner] = low[inner] * (high[inner] / low[inner]) ** share[inner]
    return result


@dataclass(frozen=True)
class _Tile:
    """z and r are float64; stays: where row and column are negatives of each other."""

    row: int  # the first, among this rank's images
    column: int  # the first, in the global batch
    z: Tensor
    r: Tensor
    stays: Tensor


class _Tiles:
    """Tiles of this rank's images x the texts of all ranks, computed anew each time, unless there is only one."""

    def __init__(self, images: Side, texts: Side, scale: float, regulation: Regulation, size: int) -> None:
        self.images, self.texts, self.scale, self.regulation, self.size = images, texts, scale, regulation, size
        self._only: list[_Tile] | None = None
        if len(images) <= size and len(texts) <= size:
            self._only = list(self._computed())

    def __iter__(self) -> Iterator[_Tile]:
        return iter(self._only) if self._only is not None else self._computed()

    def _computed(self) -> Iterator[_Tile]:
        for i, j, row, column in tiles_of(self.images, self.texts, (self.size, self.size)):
            cosine = (row.features @ column.features.T).double()
            theirs = None
            if self.regulation.teacher:
                assert row.teacher is not None
                assert column.teacher is not None
                theirs = (row.teacher @ column.teacher.T).double()
            stays = torch.ones_like(cosine, dtype=torch.bool)
            Excluded(row, column).fill(stays, False)
            yield _Tile(i, j, self.scale * cosine, -self.regulation.log_similarity(cosine, theirs), stays)


def _normalisers(tiles: _Tiles, job: Job) -> tuple[Tensor, Tensor]:
    """(2, b) of this rank's images and (2, N) of all texts: number of negatives; log mean of 1/s over them."""
    of_rows, of_columns = (Sums.empty(len(side), side.features.device) for side in (tiles.images, tiles.texts))
    for part in tiles:
        r = part.r.masked_fill(~part.stays, -torch.inf)
        for sums, dim, start in ((of_rows, 1, part.row), (of_columns, 0, part.column)):
            count = part.stays.sum(dim).double()
            sums.add(Sums(torch.full_like(count, -torch.inf), r.logsumexp(dim), count), start)
    of_columns = sums_over_ranks(of_columns, torch.float64, job.group)
    by_image, by_text = (
        torch.stack([sums.count, sums.normaliser - sums.count.log()]) for sums in (of_rows, of_columns)
    )
    return by_image, by_text


class _Direction:
    """What the second pass adds up for the anchors of one direction; dim: 1 where rows are the anchors, 0 for columns.

    sums: (7, n) per anchor: e^z over the negatives; over those not removed w e^z, w e^z log w, w, w^2, log w, number.
    """

    def __init__(self, tiles: _Tiles, dim: int, by_anchor: Tensor, lowest: int) -> None:
        self.tiles, self.dim, self.by_anchor = tiles, dim, by_anchor
        self.sums = by_anchor.new_zeros(7, by_anchor.shape[1])
        self.parts = torch.zeros(len(_BREAKS) + 1, dtype=torch.int64, device=by_anchor.device)
        self.breaks = torch.from_numpy(_BREAKS).to(by_anchor.device)
        self.wanted = lowest
        self.found = by_anchor.new_empty(0, 3)  # weight, anchor, negative

    def add(self, part: _Tile) -> None:
        regulation = self.tiles.regulation
        start = part.row if self.dim else part.column
        anchors = slice(start, start + part.z.shape[1 - self.dim])
        kept = part.stays
        log_mean = self.by_anchor[1, anchors].unsqueeze(self.dim)
        log_w = torch.zeros_like(part.r) if regulation.even else part.r - log_mean
        if regulation.drop_below is not None:
            kept = kept & (log_w >= math.log(regulation.drop_below))
            log_w = torch.zeros_like(log_w)
        removed = ~kept
        log_w = (log_w + math.log(regulation.negative_mass)).masked_fill_(removed, 0.0)
        w = log_w.exp().masked_fill_(removed, 0.0)
        plain = part.z.exp().masked_fill_(~part.stays, 0.0)
        regulated = w * plain
        terms = (plain, regulated, regulated * log_w, w, w.square(), log_w, kept.double())
        self.sums[:, anchors] += torch.stack([term.sum(self.dim) for term in terms])
        bins = torch.bucketize(w[part.stays], self.breaks, right=True)
        self.parts += torch.bincount(bins, minlength=len(self.parts))
        if self.wanted and not regulation.even:
            self._look_for_lowest(w.masked_fill_(~part.stays, torch.inf), part)

    def _look_for_lowest(self, w: Tensor, part: _Tile) -> None:
        bound = w.flatten().topk(min(self.wanted, w.numel()), largest=False).values[-1]
        if len(self.found) == self.wanted:
            bound = torch.minimum(bound, self.found[-1, 0])
        row, column = ((w <= bound) & part.stays).nonzero().unbind(1)
        assert self.tiles.images.first is not None
        image, text = row + (part.row + self.tiles.images.first), column + part.column
        anchor, negative = (image, text) if self.dim else (text, image)
        new = torch.stack([w[row, column], anchor.double(), negative.double()], 1)
        self.found = _first(torch.cat([self.found, new]), self.wanted)

    def _lowest(self, group: Group) -> Lowest | None:
        if not self.wanted:
            return None
        images, texts = self.tiles.images, self.tiles.texts
        assert images.first is not None
        image, text = self.found[:, 1:].long().unbind(1) if self.dim else self.found[:, 1:].long().flip(1).unbind(1)
        image = image - images.first
        student = _cosines(images.features[image], texts.features[text])
        teacher = torch.full_like(student, torch.nan)
        if images.teacher is not None and texts.teacher is not None:
            teacher = _cosines(images.teacher[image], texts.teacher[text])
        mine = torch.cat([self.found, student[:, None], teacher[:, None]], 1)
        found = row_counts(mine, group)
        every = _first(gather_rows(mine, found, group) if sum(found) else mine, self.wanted).cpu().numpy()
        weight, anchor, negative, student_cosine, teacher_cosine = every.T
        return Lowest(anchor.astype(np.int64), negative.astype(np.int64), weight, student_cosine, teacher_cosine)

    def weighed(self, group: Group) -> Weighed:
        """sums: of all anchors of the global batch, complete."""
        plain, regulated, tilted, total, squares, log_w, kept = self.sums.cpu().numpy()
        parts = sum_over_ranks(self.parts, group).cpu().numpy()
        pairs = int(parts.sum())
        negatives = self._negatives(group)
        histogram = np.zeros(len(EDGES) - 1, np.int64)
        np.add.at(histogram, _BIN_OF_PART, parts)
        has = kept > 0
        effective = total[has] ** 2 / squares[has]
        mass = np.log(regulated[has]) - np.log(plain[has])
        shape = tilted[has] / regulated[has] - mass
        return Weighed(
            anchors=len(kept),
            pairs=pairs,
            histogram=histogram,
            under=np.cumsum(parts)[_PARTS_UNDER - 1] / pairs if pairs else np.full(len(THRESHOLDS), np.nan),
            effective=_mean(effective),
            effective_share=_mean(effective / negatives[has]),
            mass=_mean(mass),
            shape=_mean(shape),
            mean_log_weight=float(log_w.sum() / kept.sum()) if has.any() else math.nan,
            lowest=self._lowest(group),
        )

    def _negatives(self, group: Group) -> np.ndarray:
        """(N,): of every anchor of the global batch."""
        count = self.by_anchor[0]
        if self.dim:
            count = gather_rows(count, row_counts(count, group), group)
        return count.cpu().numpy()


def _first(found: Tensor, count: int) -> Tensor:
    """The `count` rows of least weight, ties by anchor and then negative; found: (n, 3 or more)."""
    rows = found.cpu().numpy()
    order = np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))[:count]
    return found[torch.from_numpy(order).to(found.device)]


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(1)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
