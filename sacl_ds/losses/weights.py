"""The weight of every negative outside the loss kernels, tile by tile and across ranks (paper Eq. 4-6 and 9).

`WeightTiles` walks over images x texts twice: for the normaliser of every anchor, and for the weights themselves. What
is said of weights elsewhere (records, logged figures, reports, calibration, detectors, suspects, the study) is a
reduction over its tiles, or over `log_weights` where the whole matrix is at hand. Products have the features' type,
float32 at least; what follows is float64, whose range holds e^z without a shift: |z| is at most the logit scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sacl_ds.distributed import Group, sum_over_ranks
from sacl_ds.losses.regulated import Regulation, log_weights_of
from sacl_ds.losses.streaming import GlobalBatch, normalised, shared_ids, sums_over_ranks
from sacl_ds.losses.tiles import Excluded, Side, Sums, row_products, wide

# |log s| up to which e^r of all pairs, and sums of it, stay within the range of the type
_STEEPEST = {torch.float32: 80.0, torch.float64: 600.0}

Region = tuple[slice, slice]  # images, texts
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class OrderedMap(Protocol):
    """`map(work, items)`, with results in the items' order: the built-in one, or one with threads."""

    def __call__(self, work: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterator[_Result]: ...


def log_weights(
    cosine: Tensor, negatives: Tensor, regulation: Regulation, teacher_cosine: Tensor | None = None
) -> Tensor:
    """(n, m) log w_ij of the anchors in rows over all their candidates; -inf for what is no negative or is removed.

    cosine, teacher_cosine: (n, m) float, of whose dtype the result is; negatives: (n, m) bool.
    """
    log_similarity = regulation.log_similarity(cosine, teacher_cosine)
    return log_weights_of(log_similarity, negatives, regulation)[0] + math.log(regulation.negative_mass)


@dataclass(frozen=True)
class Contrast:
    """Contrast between this rank's images and the texts of all ranks of `group`, in rank order."""

    images: Side
    texts: Side
    group: Group = None

    @classmethod
    def of_batch(
        cls,
        image: Tensor,
        text: Tensor,
        teacher: tuple[Tensor, Tensor] | None = None,
        pair_ids: Tensor | None = None,
        group: Group = None,
        alike: Mapping[str, object] | None = None,
    ) -> Contrast:
        """Gather a global batch; every rank of `group` calls it. Raises SharedError on all where `alike` differs.

        image, text: (b, d) this rank's unit features; b may differ between ranks. teacher: its (b, d_t) unit features.
        pair_ids: (b,) or (b, k) int64; a match in any column means that two pairs are no negatives of each other.
        """
        rows = {"text": text, "teacher_text": None if teacher is None else teacher[1]}
        return cls.of(GlobalBatch.gather((image, text), teacher, pair_ids, group, rows, alike=alike))

    @classmethod
    def of(cls, batch: GlobalBatch) -> Contrast:
        """Build from a gathered batch, which has sent `text` and, where there is a teacher, `teacher_text`."""
        mine = slice(batch.start, batch.start + len(batch.image))
        ids = shared = own_ids = own_shared = None
        if batch.ids is not None:
            ids, shared = shared_ids(batch.ids)
            own_ids, own_shared = ids[mine], shared[mine]
        teacher_image = None if batch.teacher is None else batch.teacher[0].detach()
        images = Side(batch.image.detach(), teacher_image, own_ids, own_shared, batch.start)
        texts = Side(batch["text"].detach(), batch.get("teacher_text"), ids, shared, 0)
        return cls(images, texts, batch.group)

    @property
    def start(self) -> int:
        """Position of this rank's first pair in the global batch."""
        assert self.images.first is not None
        return self.images.first


@dataclass(frozen=True)
class WeightTile:
    """Some images against some texts, all (r, c); rows, columns: which, among this rank's images and among all texts.

    inverse: log(1 / s). log_means: (r,) and (c,), log of the mean of 1 / s over all negatives of each image, and of
    each text.
    """

    rows: slice
    columns: slice
    cosine: Tensor
    teacher_cosine: Tensor | None
    inverse: Tensor
    excluded: Excluded
    regulation: Regulation
    log_means: tuple[Tensor, Tensor]

    @property
    def negatives(self) -> Tensor:
        """Mask of image-text pairs that are negatives of each other."""
        return self.excluded.fill(torch.ones_like(self.inverse, dtype=torch.bool), False)

    def log_weight(self, direction: int) -> Tensor:
        """log w of each text for the image as anchor (direction 0) or of each image for the text as anchor (1), -inf
        for what is no negative or is removed."""
        regulation, mean = self.regulation, self.log_means[direction].unsqueeze(1 - direction)
        weight = torch.zeros_like(self.inverse) if regulation.even else self.inverse - mean
        if regulation.drop_below is not None:
            # 0 for those that stay, -inf for the others
            weight = (weight >= math.log(regulation.drop_below)).to(weight.dtype).log_()
        if regulation.negative_mass != 1.0:
            weight += math.log(regulation.negative_mass)
        return self.excluded.fill(weight, -torch.inf)


class WeightTiles:
    """The tiles of one contrast under one regulation, `size` images by `size` texts at most; iterable more than once.

    Every rank of the contrast's group makes it, with the same regulation (`Contrast.of_batch` compares it as `alike`).
    negatives: (b,) float64, how many each image of this rank has, and
    (N,) each text of all. teacher: compute the teacher's cosines also where the weights do not need them. fast: float32
    where the sharpness allows it, with one exponential for both directions. run: see `OrderedMap`.

    Raises ValueError for a teacher's share that counts and no teacher, or if `fast` for a sharpness over 600.
    """

    def __init__(
        self,
        contrast: Contrast,
        regulation: Regulation,
        size: int = 1024,
        *,
        teacher: bool = False,
        fast: bool = False,
        run: OrderedMap = map,
    ) -> None:
        images, texts = contrast.images, contrast.texts
        if regulation.teacher and (images.teacher is None or texts.teacher is None):
            raise ValueError(f"alpha={regulation.alpha} needs the teacher's features")
        steep = regulation.steepness
        if fast and steep > _STEEPEST[torch.float64]:
            raise ValueError(f"a sharpness of {steep:g} leaves the range of numbers; take one up to 600")
        self.contrast, self.regulation = contrast, regulation
        self._teacher, self._fast = teacher or regulation.teacher, fast
        self._dtype = torch.float32 if fast and steep <= _STEEPEST[torch.float32] else torch.float64
        parts = [[slice(i, min(len(side), i + size)) for i in range(0, len(side), size)] for side in (images, texts)]
        self.regions: list[Region] = [(rows, columns) for columns in parts[1] for rows in parts[0]]
        self._only = self._compared(self.regions[0]) if len(self.regions) == 1 else None
        sums = [Sums.empty(len(side), side.features.device) for side in (images, texts)]
        for region, both in zip(self.regions, run(self._sums, self.regions), strict=True):
            for total, part, more in zip(sums, region, both, strict=True):
                total.add(more, part.start)
        sums[1] = sums_over_ranks(sums[1], torch.float64, contrast.group)
        self.negatives = sums[0].count, sums[1].count
        self._log_means = [-normalised(0.0, each, regulation).to(self._dtype) for each in sums]

    def __iter__(self) -> Iterator[WeightTile]:
        return map(self.tile, self.regions)

    def tile(self, region: Region) -> WeightTile:
        """Compute the tile of one of `regions`; may be called from several threads."""
        rows, columns = region
        means = self._log_means[0][rows], self._log_means[1][columns]
        return WeightTile(rows, columns, *(self._only or self._compared(region)), self.regulation, means)

    @torch.no_grad()
    def _compared(self, region: Region) -> tuple[Tensor, Tensor | None, Tensor, Excluded]:
        row, column = (
            side.part(part.start, part.stop)
            for side, part in zip((self.contrast.images, self.contrast.texts), region, strict=True)
        )
        features = row.features, column.features
        with torch.autocast(features[0].device.type, enabled=False):
            cosine, theirs = self._product(*features), None
            if self._teacher:
                assert row.teacher is not None
                assert column.teacher is not None
                theirs = self._product(row.teacher, column.teacher)
            inverse = self.regulation.log_similarity(cosine, theirs if self.regulation.teacher else None).neg_()
        return cosine, theirs, inverse, Excluded(row, column)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        dtype = wide(a)
        return (a.to(dtype) @ b.to(dtype).T).to(self._dtype)

    def _sums(self, region: Region) -> tuple[Sums, Sums]:
        """Return the tile's share in the sums of its images and of its texts."""
        _, _, inverse, excluded = self._only or self._compared(region)
        left_out = excluded.counts()
        if self._only:
            inverse = inverse.clone()  # the second pass takes it up again
        if self._fast:
            exponential = excluded.fill(inverse.exp_(), 0.0)
            logs = [exponential.sum(dim).double().log() for dim in (1, 0)]
        else:
            excluded.fill(inverse, -torch.inf)
            logs = [inverse.logsumexp(dim) for dim in (1, 0)]
        of_rows, of_columns = (
            Sums(torch.full_like(log, -torch.inf), log, inverse.shape[1 - side] - left_out[side].double())
            for side, log in enumerate(logs)
        )
        return of_rows, of_columns


class AnchorSums(NamedTuple):
    """Sums over the negatives of n anchors, (n,) float64 each.

    plain: e^z. regulated: w e^z; tilted: w e^z log w. weight: w; square: w^2. log_weight, logit: log w and z of those
    that weigh; kept: how many these are. negatives: how many there are with those that `drop_below` removed, of which w
    is 0.
    """

    plain: Tensor
    regulated: Tensor
    tilted: Tensor
    weight: Tensor
    square: Tensor
    log_weight: Tensor
    logit: Tensor
    kept: Tensor
    negatives: Tensor

    @classmethod
    def of(cls, z: Tensor, log_weight: Tensor, negatives: Tensor) -> AnchorSums:
        """Sums of the anchors in rows: (n, m) z, log w (-inf where none) and bool mask of the negatives."""
        z = z.double().masked_fill(~negatives, 0.0)
        plain = z.exp().masked_fill_(~negatives, 0.0)
        return cls._of_tile(z, plain, log_weight.double().clone(), negatives.sum(1).double(), 0, True)

    @classmethod
    def _of_tile(
        cls, z: Tensor, plain: Tensor, log_weight: Tensor, negatives: Tensor, direction: int, removes: bool
    ) -> AnchorSums:
        """z and e^z: 0 for what is no negative. log_weight is overwritten. negatives: how many each anchor has here.
        removes: whether some of them may have no weight."""
        dim = 1 - direction
        logit, kept = z, negatives
        if removes:
            weighs = log_weight > -torch.inf
            logit, kept = z * weighs, weighs.sum(dim).double()
        weight = log_weight.exp()
        log_weight.nan_to_num_(neginf=0.0)
        regulated = weight * plain
        return cls(
            plain=plain.sum(dim),
            regulated=regulated.sum(dim),
            tilted=regulated.mul_(log_weight).sum(dim),
            weight=weight.sum(dim),
            square=weight.square_().sum(dim),
            log_weight=log_weight.sum(dim),
            logit=logit.sum(dim),
            kept=kept,
            negatives=negatives,
        )

    @property
    def mass(self) -> Tensor:
        """(n,) X - log sum e^z in nats: the weights' part in the log-sum of all negatives."""
        return self.regulated.log() - self.plain.log()

    @property
    def shape(self) -> Tensor:
        """(n,) KL(q || p) in nats of q ~ w e^z from p ~ e^z over all negatives."""
        return self.tilted / self.regulated - self.mass

    @property
    def effective(self) -> Tensor:
        """(n,) effective number of negatives, (sum w)^2 / sum w^2."""
        return self.weight.square() / self.square


def anchor_sums(
    tiles: WeightTiles, logit_scale: float, also: Callable[[int, WeightTile, Tensor], None] = lambda *_: None
) -> tuple[AnchorSums, AnchorSums]:
    """Sums of this rank's images (b,) and of all ranks' texts (N,) as anchors, complete.

    also(direction, tile, log w) is called with each tile on the way.
    """
    contrast = tiles.contrast
    sums = [side.features.new_zeros(9, len(side), dtype=torch.float64) for side in (contrast.images, contrast.texts)]
    removes = tiles.regulation.drop_below is not None
    for tile in tiles:
        z = logit_scale * tile.cosine
        plain = tile.excluded.fill(z.exp(), 0.0)
        tile.excluded.fill(z, 0.0)
        left_out = tile.excluded.counts()
        for direction, part in enumerate((tile.rows, tile.columns)):
            log_weight = tile.log_weight(direction)
            also(direction, tile, log_weight)
            negatives = z.shape[1 - direction] - left_out[direction].double()
            more = AnchorSums._of_tile(z, plain, log_weight, negatives, direction, removes)
            sums[direction][:, part] += torch.stack(more)
    return AnchorSums(*sums[0]), AnchorSums(*sum_over_ranks(sums[1], contrast.group))


def mutual_information(tiles: WeightTiles, logit_scale: float) -> dict[str, Tensor]:
    """Figures of a global batch for a log: 0-dim float64 tensors, equal on all ranks.

    The critic's pointwise mutual information is PMI_ij = z_ij + log w_ij - log mean_k (w_ik e^z_ik), with w_ii = 1, k
    over the anchor's positive and all its negatives, and w = 0 for what `drop_below` removed.

    `pmi_positive`: mean of PMI over the positives, which is log(1 + |Neg|) less the regulated loss. `infonce_bound`:
    the same without weights, log(1 + |Neg|) - InfoNCE loss. `pmi_negative`, `pmi_negative_target`: means of PMI and of
    log(1/w) over the pairs of anchor and negative that weigh; the paper's heuristic says that the former approaches the
    latter. `negative_mass_log`: mean over the anchors with a negative that weighs of what the weights add to the
    log-sum of all negatives. `negatives`: how many an anchor has, those that were removed among them.
    """
    contrast, b = tiles.contrast, len(tiles.contrast.images)
    mine = slice(contrast.start, contrast.start + b)
    own = row_products(contrast.images.features, contrast.texts.part(mine.start, mine.stop).features) * logit_scale
    images, texts = anchor_sums(tiles, logit_scale)
    total = torch.zeros(9, dtype=torch.float64, device=own.device)
    for sums in (images, AnchorSums(*(each[mine] for each in texts))):
        weighs = sums.kept > 0
        log_mean = torch.logaddexp(own, sums.regulated.log()) - sums.negatives.log1p()
        total += torch.stack(
            [
                torch.full_like(total[0], b),
                sums.negatives.sum(),
                sums.kept.sum(),
                weighs.sum().double(),
                (own - log_mean).sum(),
                (sums.logit + sums.log_weight - sums.kept * log_mean).sum(),
                -sums.log_weight.sum(),
                (sums.negatives.log1p() - softplus(sums.plain.log() - own, threshold=80.0)).sum(),
                sums.mass.masked_fill(~weighs, 0.0).sum(),
            ]
        )
    anchors, negatives, kept, weigh, positive, negative, target, bound, mass = sum_over_ranks(total, contrast.group)
    return {
        "pmi_positive": positive / anchors,
        "pmi_negative": negative / kept.clamp(min=1),
        "pmi_negative_target": target / kept.clamp(min=1),
        "infonce_bound": bound / anchors,
        "negative_mass_log": mass / weigh.clamp(min=1),
        "negatives": negatives / anchors,
    }
