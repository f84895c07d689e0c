"""Distribution of the weights of a global batch: histogram, means over anchors, pairs of least weight.

Reductions over `sacl_ds.losses.weights.WeightTiles`, for records and analysis.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sacl_ds.distributed import Group, gather_rows, row_counts, sum_over_ranks
from sacl_ds.losses.regulated import Regulation
from sacl_ds.losses.weights import AnchorSums, Contrast, WeightTile, WeightTiles, anchor_sums

if TYPE_CHECKING:
    import numpy as np

EDGES = (0.0, *(10.0 ** (k / 20) for k in range(-80, 41)), math.inf)
"""Edges of the bins of weights: 0, then 1e-4 to 1e2 with 20 bins a decade, then inf. A bin holds its lower edge."""
THRESHOLDS = tuple(tenth / 10 for tenth in range(1, 10))
"""Weights under which pairs are counted exactly."""

# counts are kept by parts, between neighbouring breaks; parts add up to bins, and to what is under a threshold
_BREAKS = tuple(sorted({*EDGES[1:-1], *THRESHOLDS}))
_BIN_OF_PART = [bisect_right(EDGES, start) - 1 for start in (0.0, *_BREAKS)]
_PARTS_UNDER = [bisect_left(_BREAKS, threshold) + 1 for threshold in THRESHOLDS]


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

    Raises ValueError for a teacher's share without a teacher, and on all ranks where these disagree on what they bring.
    """
    alike = {**regulation.alike, "lowest": lowest, "logit_scale": torch.as_tensor(logit_scale)}
    tiles = WeightTiles(Contrast.of_batch(image, text, teacher, pair_ids, group, alike), regulation, tile)
    directions = _Direction(tiles, 0, lowest), _Direction(tiles, 1, lowest)

    def add(direction: int, part: WeightTile, log_weight: Tensor) -> None:
        directions[direction].add(part, log_weight)

    images, texts = anchor_sums(tiles, float(logit_scale), add)
    # those of this rank's images are complete here, those of texts already everywhere
    everyone = gather_rows(torch.stack(images, 1), row_counts(image, group), group)
    return directions[0].weighed(AnchorSums(*everyone.T)), directions[1].weighed(texts)


def quantiles(histogram: np.ndarray, qs: Sequence[float]) -> np.ndarray:
    """(len(qs),) float64: the weights that shares `qs` of the pairs do not exceed; NaN for an empty histogram.

    Interpolated in the logarithm of the weight within a bin; under EDGES[1] in the weight itself, and from EDGES[-2] on
    that edge is all that is known.
    """
    import numpy as np

    edges, cumulative = np.array(EDGES), np.cumsum(histogram)
    total = cumulative[-1]
    if total == 0:
        return np.full(len(qs), np.nan)
    wanted = np.asarray(qs, np.float64) * total
    # the first bin that reaches the count; for q = 0 the first with anything in it
    place = np.searchsorted(cumulative, np.maximum(wanted, 1e-9), side="left").clip(max=len(histogram) - 1)
    share = ((wanted - (cumulative - histogram)[place]) / histogram[place]).clip(0.0, 1.0)
    low, high = edges[place], edges[place + 1]
    inner = (place > 0) & (place < len(histogram) - 1)
    result = np.where(place == 0, share * EDGES[1], EDGES[-2])
    result[inner] = low[inner] * (high[inner] / low[inner]) ** share[inner]
    return result


class _Direction:
    """Counts of weights, and the pairs of least weight, of one direction; see `WeightTile.log_weight`."""

    def __init__(self, tiles: WeightTiles, direction: int, lowest: int) -> None:
        self.contrast, self.direction, self.wanted = tiles.contrast, direction, lowest
        self.even = tiles.regulation.even
        features = tiles.contrast.images.features
        self.breaks = torch.tensor(_BREAKS, dtype=torch.float64, device=features.device)
        self.parts = torch.zeros(len(_BREAKS) + 1, dtype=torch.int64, device=features.device)
        self.found = features.new_empty(0, 3, dtype=torch.float64)  # weight, anchor, negative

    def add(self, tile: WeightTile, log_weight: Tensor) -> None:
        weight, negatives = log_weight.exp(), tile.negatives
        bins = torch.bucketize(weight[negatives], self.breaks, right=True)
        self.parts += torch.bincount(bins, minlength=len(self.parts))
        if self.wanted and not self.even:
            self._look_for_lowest(weight.masked_fill_(~negatives, torch.inf), tile)

    def _look_for_lowest(self, weight: Tensor, tile: WeightTile) -> None:
        bound = weight.flatten().topk(min(self.wanted, weight.numel()), largest=False).values[-1]
        if len(self.found) == self.wanted:
            bound = torch.minimum(bound, self.found[-1, 0])
        row, column = ((weight <= bound) & (weight < torch.inf)).nonzero().unbind(1)
        image, text = row + (tile.rows.start + self.contrast.start), column + tile.columns.start
        anchor, negative = (text, image) if self.direction else (image, text)
        new = torch.stack([weight[row, column], anchor.double(), negative.double()], 1)
        self.found = _first(torch.cat([self.found, new]), self.wanted)

    def _lowest(self) -> Lowest | None:
        if not self.wanted:
            return None
        import numpy as np

        images, texts, group = self.contrast.images, self.contrast.texts, self.contrast.group
        positions = self.found[:, 1:].long()
        image, text = (positions.flip(1) if self.direction else positions).unbind(1)
        image = image - self.contrast.start
        student = _cosines(images.features[image], texts.features[text])
        teacher = torch.full_like(student, torch.nan)
        if images.teacher is not None and texts.teacher is not None:
            teacher = _cosines(images.teacher[image], texts.teacher[text])
        mine = torch.cat([self.found, student[:, None], teacher[:, None]], 1)
        found = row_counts(mine, group)
        every = _first(gather_rows(mine, found, group) if sum(found) else mine, self.wanted).cpu().numpy()
        weight, anchor, negative, student_cosine, teacher_cosine = every.T
        return Lowest(anchor.astype(np.int64), negative.astype(np.int64), weight, student_cosine, teacher_cosine)

    def weighed(self, sums: AnchorSums) -> Weighed:
        """Return the direction's result. sums: of all anchors of the global batch."""
        import numpy as np

        parts = sum_over_ranks(self.parts, self.contrast.group).cpu().numpy()
        pairs = int(parts.sum())
        histogram = np.zeros(len(EDGES) - 1, np.int64)
        np.add.at(histogram, _BIN_OF_PART, parts)
        has = sums.kept > 0
        log_weight, kept = (each.cpu().numpy() for each in (sums.log_weight, sums.kept))
        return Weighed(
            anchors=len(kept),
            pairs=pairs,
            histogram=histogram,
            under=np.cumsum(parts)[np.array(_PARTS_UNDER) - 1] / pairs if pairs else np.full(len(THRESHOLDS), np.nan),
            effective=_mean(sums.effective[has]),
            effective_share=_mean((sums.effective / sums.negatives)[has]),
            mass=_mean(sums.mass[has]),
            shape=_mean(sums.shape[has]),
            mean_log_weight=float(log_weight.sum() / kept.sum()) if kept.any() else math.nan,
            lowest=self._lowest(),
        )


def _first(found: Tensor, count: int) -> Tensor:
    """Return the `count` rows of least weight, ties by anchor and then negative; found: (n, 3 or more)."""
    import numpy as np

    rows = found.cpu().numpy()
    order = np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))[:count]
    return found[torch.from_numpy(order).to(found.device)]


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(1)


def _mean(values: Tensor) -> float:
    return float(values.cpu().numpy().mean()) if len(values) else math.nan
