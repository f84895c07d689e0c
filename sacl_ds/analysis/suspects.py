"""suspects: likely false negatives and exact duplicates of a whole set, as a table, and a grouping for the loader."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as arrow
import torch
from pyarrow import csv, parquet
from torch import Tensor

from sacl_ds.analysis.inputs import examine, in_order, progress, regulation_for, say, table
from sacl_ds.analysis.pairs import Pairs
from sacl_ds.data.captions import normalised
from sacl_ds.errors import UserError
from sacl_ds.files import seal
from sacl_ds.losses import Regulation
from sacl_ds.losses.weights import Contrast, Region, WeightTile, WeightTiles


@dataclass(frozen=True)
class Groups:
    """Groups of samples.

    of: (n,) int64, a number for each sample in a group of at least two, else -1. Numbers count from 0.

    sizes: of the groups, the largest first. refused: links that were left out since a group would have grown past the
    bound. largest_uncapped: the largest group with all links.
    """

    of: np.ndarray
    sizes: list[int]
    refused: int
    largest_uncapped: int


def connected(samples: int, links: np.ndarray, largest: int) -> Groups:
    """Connected components; links (m, 2) int of samples, the strongest first, are taken in their order.

    A link that would make a group of more than `largest` samples is left out: similarity is not transitive, and a chain
    of weak links would else put half of a data set into one group.
    """
    capped, refused = _Forest(samples), 0
    whole = _Forest(samples)
    for a, b in links.tolist():
        whole.join(a, b, samples)
        refused += not capped.join(a, b, largest)
    roots = np.array([capped.root(sample) for sample in range(samples)], np.int64)
    found, place, sizes = np.unique(roots, return_inverse=True, return_counts=True)
    numbers = np.full(len(found), -1, np.int64)
    numbers[sizes > 1] = np.arange(int((sizes > 1).sum()))
    return Groups(numbers[place], sorted(sizes[sizes > 1].tolist(), reverse=True), refused, max(whole.sizes, default=0))


def repeats(values: Sequence[Hashable]) -> np.ndarray:
    """(m, 2) int64: each occurrence of a value after its first, with that first one; '' repeats nothing."""
    first: dict[Hashable, int] = {}
    found = []
    for place, value in enumerate(values):
        if value == "":
            continue
        earlier = first.setdefault(value, place)
        if earlier != place:
            found.append((earlier, place))
    return np.array(found, np.int64).reshape(-1, 2)


def spread(sizes: Sequence[int]) -> str:
    """Describe group sizes: '12 groups of 30 samples: 8 of 2, 3 of 3, the largest of 5'."""
    if not sizes:
        return "no groups"
    counts = sorted(Counter(sizes).items())
    shown = ", ".join(f"{count} of {size}" for size, count in counts[:3])
    more = f", the largest of {counts[-1][0]}" if len(counts) > 3 else ""
    return f"{len(sizes)} groups of {sum(sizes)} samples: {shown}{more}"


class _Forest:
    """Union-find with sizes at the roots."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))
        self.sizes = [1] * count

    def root(self, sample: int) -> int:
        while self._above[sample] != sample:
            self._above[sample] = self._above[self._above[sample]]
            sample = self._above[sample]
        return sample

    def join(self, a: int, b: int, largest: int) -> bool:
        """Unite the groups of both; return whether they are in one group afterwards."""
        a, b = self.root(a), self.root(b)
        if a == b:
            return True
        if self.sizes[a] + self.sizes[b] > largest:
            return False
        if self.sizes[a] < self.sizes[b]:
            a, b = b, a
        self._above[b] = a
        self.sizes[a] += self.sizes[b]
        return True


TILE = 2048
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Found:
    """Pairs of image `image` and caption `text`, rows of the set, the most suspected first; numpy arrays alike.

    weight_image, weight_text: of the caption for the image as anchor, and of the image for the caption; weight: the
    smaller of both. similarity, teacher_similarity: cosines, the teacher's NaN without one. chosen: how many pairs pass
    the bound; at most the asked number of them is here. pairs: of an image and a caption that are negatives.
    """

    image: np.ndarray
    text: np.ndarray
    weight_image: np.ndarray
    weight_text: np.ndarray
    similarity: np.ndarray
    teacher_similarity: np.ndarray
    chosen: int
    pairs: int

    @property
    def weight(self) -> np.ndarray:
        return np.minimum(self.weight_image, self.weight_text)


@torch.no_grad()
def least_weights(
    pairs: Pairs,
    regulation: Regulation,
    bound: float,
    top: int,
    *,
    by_similarity: bool = False,
    tile: int = TILE,
    done: Callable[[int], None] = lambda tiles: None,
) -> Found:
    """Find the `top` pairs of least weight under `bound`, or by cosine the greatest above it.

    by_similarity: by cosine, the teacher's if there is one. Weights have mean 1 over all negatives of an anchor in the
    set; none is removed. Pairs of rows that share an id are no negatives. done(1) is called after each of `tile_count`
    tiles, one a thread. Raises UserError for a sharpness that leaves the range of numbers.
    """
    image, text, ids = (torch.from_numpy(each) for each in (pairs.image, pairs.text, pairs.pair_ids))
    teacher = None
    if pairs.teacher is not None:
        teacher = torch.from_numpy(pairs.teacher[0]), torch.from_numpy(pairs.teacher[1])
    alpha = 0.0 if teacher is None else regulation.alpha
    regulation = replace(regulation, alpha=alpha, negative_mass=1.0, drop_below=None)

    def run(work: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterator[_Result]:
        for result in in_order(work, items):
            yield result
            done(1)

    try:
        contrast, by_teacher = Contrast.of_batch(image, text, teacher, ids), by_similarity and teacher is not None
        tiles = WeightTiles(contrast, regulation, tile, teacher=by_teacher, fast=True, run=run)
    except ValueError as error:
        raise UserError(str(error)) from None
    limit = -bound if by_similarity else math.log(bound) if bound > 0 else -math.inf
    chosen, kept = 0, torch.empty(0, 6, dtype=torch.float64)

    def search(region: Region) -> tuple[int, Tensor]:
        # what scores above the last one kept, in whichever thread, need not be looked at
        worst = float(kept[-1, 0]) if len(kept) == top else math.inf
        return _candidates(tiles.tile(region), by_similarity, limit, worst, top)

    for passed, new in run(search, tiles.regions):
        chosen += passed
        if len(new):
            kept = _first(torch.cat([kept, new]), top)
    _, rows, columns, of_image, of_text, similarity = kept.numpy().T
    rows, columns = rows.astype(np.int64), columns.astype(np.int64)
    of_teacher = np.full(len(rows), np.nan)
    if pairs.teacher is not None:
        a, b = pairs.teacher[0][rows], pairs.teacher[1][columns]
        of_teacher = (a.astype(np.float64) * b).sum(1)
    negatives = int(tiles.negatives[0].sum())
    return Found(rows, columns, np.exp(of_image), np.exp(of_text), similarity, of_teacher, chosen, negatives)


def tile_count(pairs: int, tile: int = TILE) -> int:
    """Return the number of tiles in both passes over the pairs."""
    return 2 * math.ceil(pairs / tile) ** 2


def _candidates(tile: WeightTile, by_similarity: bool, limit: float, worst: float, top: int) -> tuple[int, Tensor]:
    """Count the tile's pairs that score under `limit`, and list the `top` lowest that score at most `worst`.

    Returns the list as (m, 6): score, image, text, two log weights, cosine.
    """
    by_image, by_text = tile.log_weight(0), tile.log_weight(1)
    if by_similarity:
        score = -(tile.cosine if tile.teacher_cosine is None else tile.teacher_cosine)
    else:
        score = torch.minimum(by_image, by_text)
    tile.excluded.fill(score, torch.inf)
    passes = score < limit
    passed = int(passes.sum())
    if worst < limit:
        passes &= score <= worst
    row, column = passes.nonzero().unbind(1)
    if len(row) > top:
        best = score[row, column].topk(top, largest=False).indices
        row, column = row[best], column[best]
    values = [score, row + tile.rows.start, column + tile.columns.start, by_image, by_text, tile.cosine]
    return passed, torch.stack([(x[row, column] if x.ndim == 2 else x).double() for x in values], 1)


def _first(rows: Tensor, count: int) -> Tensor:
    """The `count` rows of least score, ties by position."""
    values = rows.numpy()
    return rows[torch.from_numpy(np.lexsort((values[:, 2], values[:, 1], values[:, 0]))[:count])]


_SHOWN = 8  # rows on the screen
_FLOATS = ("weight", "weight_image_to_text", "weight_text_to_image", "similarity", "teacher_similarity")
_OF_PAIRS = {"key": "keys", "shard": "shards", "sha256": "sha256", "url": "urls", "caption": "captions"}


def act(options: argparse.Namespace) -> None:
    """Run the subcommand `suspects`."""
    out = Path(options.out)
    if out.suffix not in (".parquet", ".csv"):
        raise UserError(f"--out {out}: its name ends in .parquet or .csv")
    if options.grouping and Path(options.grouping).suffix != ".parquet":
        raise UserError(f"--grouping {options.grouping}: its name ends in .parquet")
    if options.top < 1 or options.largest_group < 2:
        raise UserError("--top is at least 1, and --largest-group at least 2")
    examined = examine(options.path, options)
    pairs, by_similarity = examined.pairs, options.similarity_above is not None
    regulation = regulation_for(examined, options)
    if regulation.even and not by_similarity:
        raise UserError("all negatives weigh the same, so none is suspected; give --sharpness, or --similarity-above")
    bound = options.similarity_above if by_similarity else options.weight_under
    with progress("suspects", tile_count(len(pairs)), "tiles") as done:
        found = least_weights(pairs, regulation, bound, options.top, by_similarity=by_similarity, done=done)
    links = np.stack([found.image, found.text], 1)
    groups = connected(len(pairs), links, options.largest_group)
    what = f"a cosine above {bound:g}" if by_similarity else f"a weight under {bound:g}"
    say(f"{found.chosen} of {found.pairs} pairs of an image and another's caption have {what}")
    if found.chosen > len(found.image):
        say(f"note: the {len(found.image)} most suspected of them are listed; --top lists more")
    exact = {
        "same image": repeats(pairs.sha256),
        "same caption": repeats([normalised(caption) for caption in pairs.captions]),
    }
    for kind, places in exact.items():
        say(f"{len(places)} samples have the {kind.removeprefix('same ')} of an earlier one")
        if len(places) > options.top:
            say(f"note: {options.top} of them are listed; --top lists more")
    columns = suspects_table(pairs, found, {kind: places[: options.top] for kind, places in exact.items()}, groups)
    _print(pairs, found)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".csv":
        csv.write_csv(columns, out)
    else:
        parquet.write_table(columns, out)
    say(f"written: {out}")
    if options.grouping:
        _write_grouping(pairs, groups, Path(options.grouping), options.largest_group)


def suspects_table(pairs: Pairs, found: Found, exact: dict[str, np.ndarray], groups: Groups) -> arrow.Table:
    """A row a pair: `key` and its like are of the image's sample, `other_key` and its like of the caption's.

    kind: 'low weight', 'same image' or 'same caption'; of the latter two, weights and similarities are null. group: of
    both, null where they are not in one.
    """
    image = np.concatenate([found.image, *(places[:, 0] for places in exact.values())])
    text = np.concatenate([found.text, *(places[:, 1] for places in exact.values())])
    kinds = ["low weight"] * len(found.image)
    kinds += [kind for kind, places in exact.items() for _ in places]
    values = dict(
        zip(
            _FLOATS,
            (found.weight, found.weight_image, found.weight_text, found.similarity, found.teacher_similarity),
            strict=True,
        )
    )
    rest = np.full(len(image) - len(found.image), np.nan)
    columns: dict[str, Any] = {"kind": kinds}
    columns |= {name: arrow.array(np.concatenate([values[name], rest]), from_pandas=True) for name in _FLOATS}
    for prefix, rows in (("", image), ("other_", text)):
        for name, attribute in _OF_PAIRS.items():
            known = getattr(pairs, attribute)
            columns[prefix + name] = [known[row] for row in rows.tolist()] if known else [""] * len(rows)
    together = (groups.of[image] == groups.of[text]) & (groups.of[image] >= 0)
    columns["group"] = arrow.array(groups.of[image], mask=~together)
    return arrow.table(columns)


def _write_grouping(pairs: Pairs, groups: Groups, path: Path, largest: int) -> None:
    say(spread(groups.sizes))
    if groups.refused:
        say(
            f"warning: with all links the largest group would hold {groups.largest_uncapped} of {len(pairs)} samples; "
            f"{groups.refused} links were left out to keep each at {largest} (--largest-group); "
            "a lower --weight-under links less"
        )
    members = np.flatnonzero(groups.of >= 0).tolist()
    columns = {
        "key": [pairs.keys[row] for row in members],
        "shard": [pairs.shards[row] for row in members],
        "group": arrow.array(groups.of[members]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path)
    seal(path.parent, (path.name,))
    say(f"written: {path}; train with data.grouping={path}")


def _print(pairs: Pairs, found: Found) -> None:
    rows = []
    for place in range(min(_SHOWN, len(found.image))):
        image, text = found.image[place], found.text[place]
        theirs = found.teacher_similarity[place]
        rows.append(
            [
                pairs.keys[image],
                pairs.captions[image],
                pairs.captions[text],
                f"{found.weight[place]:.3f}",
                f"{found.similarity[place]:.2f}",
                "" if np.isnan(theirs) else f"{theirs:.2f}",
            ]
        )
    if rows:
        table(["image", "its caption", "another's caption", "weight", "cosine", "teacher's"], rows, left=3)
