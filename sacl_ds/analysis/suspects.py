"""suspects: likely false negatives and exact duplicates of a whole set, as a table, and a grouping for the loader."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import csv, parquet

from sacl_ds.analysis.groups import Groups, connected, repeats, spread
from sacl_ds.analysis.inputs import examine, regulation_for
from sacl_ds.analysis.low_weights import Found, least_weights, tile_count
from sacl_ds.analysis.pairs import Pairs
from sacl_ds.analysis.terminal import progress, say, table
from sacl_ds.checksums import seal
from sacl_ds.data.captions import normalised
from sacl_ds.errors import UserError

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
