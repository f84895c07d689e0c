"""Weights of single pairs: the matrix of a mini-batch (paper Fig. 7), anchors with their lightest negatives (8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sacl_ds.analysis.pairs import MiniBatch, Pairs, mini_batch
from sacl_ds.analysis.report.page import Card, Cell, Matrix, Section, Strip, Table, card, clean, percent, shown
from sacl_ds.analysis.report.sections import SceneTruth, verdict
from sacl_ds.evaluation.metrics import mean_average_precision, recall_at_k
from sacl_ds.losses import Regulation
from sacl_ds.losses.distribution import weigh
from sacl_ds.telemetry.records import DIRECTIONS
from sacl_ds.telemetry.sheet import FIRST, MARKED, PLAIN, Tile, draw_matrix, draw_rows
from sacl_ds.training.records import lowest_rows

SHOWN = 8  # pairs of the matrix
_ANCHORS, _NEGATIVES = 6, 5  # of a gallery, per direction
_LIGHT, _HEAVY = (214, 104, 16), (36, 104, 180)  # weights under and over 1
_HEADINGS = {
    "image_to_text": "Images as anchors, texts as their negatives",
    "text_to_image": "Texts as anchors, images as their negatives",
}
_STRONGEST = 0.55  # opacity of a shade; text stays legible on it in both colour schemes

Place = tuple[str, str]  # shard, key
Pictures = Mapping[Place, Image.Image]
FindPictures = Callable[[Sequence[Place]], Pictures]


def chosen(batch: MiniBatch, count: int) -> list[int]:
    """Choose `count` pairs of the mini-batch to show: lowest weights of images over texts, anchor beside negative."""
    if len(batch.negatives) <= count:
        return list(range(len(batch.negatives)))
    rows, columns = np.nonzero(batch.negatives)
    order = np.argsort(batch.image_to_text[rows, columns], kind="stable")
    picked: dict[int, None] = {}
    for place in order:
        pair = [int(rows[place]), int(columns[place])]
        if len(picked.keys() | set(pair)) <= count:
            picked |= dict.fromkeys(pair)
        if len(picked) == count:
            break
    for index in range(len(batch.negatives)):  # where few pairs have negatives
        if len(picked) < count:
            picked.setdefault(index)
    return list(picked)


def matrix(
    pairs: Pairs, regulation: Regulation, find: FindPictures, truth: SceneTruth | None, folder: Path, origin: str
) -> Section:
    """Weights of a whole mini-batch, of which some pairs are shown. origin: what the pairs are, for the reader."""
    batch = mini_batch(pairs, regulation)
    picked = chosen(batch, SHOWN)
    part = pairs.take(picked)
    found = find(list(zip(part.shards, part.keys, strict=True)))
    cards = [
        card(found.get((shard, key)), caption)
        for shard, key, caption in zip(part.shards, part.keys, part.captions, strict=True)
    ]
    relevant = None
    if truth is not None:
        relevant = truth.table(part.keys, part.captions).T
    cells, drawn = [], []
    for i, row in enumerate(picked):
        cells.append(
            [_cell(batch, row, column, None if relevant is None else relevant[i, j]) for j, column in enumerate(picked)]
        )
        drawn.append([_drawn(cell, batch, row, column) for cell, column in zip(cells[-1], picked, strict=True)])
    path = folder / "weight_matrix.png"
    tiles = [
        Tile(found.get((shard, key)), (clean(caption),))
        for shard, key, caption in zip(part.shards, part.keys, part.captions, strict=True)
    ]
    draw_matrix(tiles, drawn, path)
    title = f"Weights of {len(picked)} of the {len(pairs)} pairs of a mini-batch"
    section = Section("matrix", "A mini-batch")
    section.text = [
        f"Rows are images as anchors, columns texts as their negatives. The mini-batch is {origin}, weighed as at the "
        f"end of the run (κ {regulation.sharpness:g}, α {regulation.alpha:g}); the pairs shown are those of "
        "its lowest weights. Orange: under 1, blue: over 1."
    ]
    if relevant is not None:
        section.text[0] += " ‘true’ marks texts that are true of the image: false negatives."
    section.matrix = Matrix(title, cards, cells)
    section.numbers = {
        "pairs": len(pairs),
        "keys": part.keys,
        "shards": part.shards,
        "captions": part.captions,
        "image_to_text": batch.image_to_text[np.ix_(picked, picked)],
        "text_to_image": batch.text_to_image[np.ix_(picked, picked)],
        "negatives": batch.negatives[np.ix_(picked, picked)],
        "relevance": relevant,
        "picture": f"pictures/{path.name}",
    }
    return section


def gallery(
    lowest: Sequence[dict[str, Any]],
    find: FindPictures,
    truth: SceneTruth | None,
    folder: Path,
    origin: str,
) -> Section:
    """Anchors with their lightest negatives. lowest: records of one step, both directions; origin: for the reader."""
    section = Section("gallery", "Lightest negatives", [origin])
    if not lowest:
        section.text = ["All negatives weigh the same in this run, so that none is the lightest."]
        section.numbers = {"groups": []}
        return section
    groups = [
        (direction, group)
        for direction in DIRECTIONS
        for group in _groups([entry for entry in lowest if entry["direction"] == direction])
    ]
    wanted = {
        (entry[f"{side}_shard"], entry[f"{side}_key"])
        for _, group in groups
        for entry in group
        for side in ("anchor", "negative")
    }
    found = find(sorted(wanted))
    section.numbers = {"groups": [], "pictures_found": len(found), "pictures_wanted": len(wanted)}
    rows: list[tuple[str, list[Tile]]] = []
    verdicts = [relevance for entry in lowest if (relevance := _relevance(truth, entry)) is not None]
    if verdicts:
        share = sum(relevance == 1.0 for relevance in verdicts) / len(verdicts)
        section.text.append(
            f"Of the {len(lowest)} lightest pairs of both directions {percent(share)} are false negatives: the caption "
            "is in fact true of the picture."
        )
        section.numbers["false_negatives"] = share
    for direction, group in groups:
        new = not section.numbers["groups"] or section.numbers["groups"][-1]["direction"] != direction
        section.strips.append(_strip(direction, group, found, truth, _HEADINGS[direction] if new else ""))
        rows.append((f"{_HEADINGS[direction]} · {section.strips[-1].title}", _tiles(group, found, truth)))
        section.numbers["groups"].append(
            {"direction": direction, "entries": [{**e, "relevance": _relevance(truth, e)} for e in group]}
        )
    draw_rows(rows, folder / "gallery.png")
    section.numbers["picture"] = "pictures/gallery.png"
    return section


def lowest_of(pairs: Pairs, regulation: Regulation, count: int) -> list[dict[str, Any]]:
    """The lightest pairs of one mini-batch of these pairs, as the records of a run have them. Without teacher features
    alpha counts as 0."""

    def tensor(features: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(features.astype(np.float64))

    teacher = None if pairs.teacher is None else (tensor(pairs.teacher[0]), tensor(pairs.teacher[1]))
    both = weigh(
        tensor(pairs.image),
        tensor(pairs.text),
        pairs.logit_scale,
        teacher=teacher,
        pair_ids=torch.from_numpy(pairs.pair_ids),
        regulation=regulation if teacher else replace(regulation, alpha=0.0),
        lowest=count,
    )
    named = dict(enumerate(zip(pairs.keys, pairs.shards, pairs.captions, strict=True)))
    return [row for name, one in zip(DIRECTIONS, both, strict=True) for row in lowest_rows(name, one.lowest, named)]


def _groups(entries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group entries by anchor, ordered by each group's lowest weight."""
    by_anchor: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda each: each["weight"]):
        anchor = entry["anchor_shard"], entry["anchor_key"], entry["anchor_caption"]
        by_anchor.setdefault(anchor, []).append(entry)
    return [group[:_NEGATIVES] for group in by_anchor.values()][:_ANCHORS]


def _relevance(truth: SceneTruth | None, entry: dict[str, Any]) -> float | None:
    """Return how far the entry's text is true of its image, or None where that is not known."""
    if truth is None:
        return None
    text, image = ("negative", "anchor") if entry["direction"] == "image_to_text" else ("anchor", "negative")
    return truth.relevance(entry[f"{text}_key"], entry[f"{text}_caption"], entry[f"{image}_key"])


def _similarities(entry: dict[str, Any]) -> list[str]:
    teacher = entry["teacher_similarity"]
    lines = [f"weight {shown(entry['weight'], 2)}", f"student {entry['student_similarity']:.2f}"]
    return lines + ([f"teacher {teacher:.2f}"] if np.isfinite(teacher) else [])


def _strip(
    direction: str, group: Sequence[dict[str, Any]], found: Pictures, truth: SceneTruth | None, heading: str
) -> Strip:
    image_anchor = direction == "image_to_text"
    first = group[0]
    cards = []
    for entry in group:
        badge, good = verdict(_relevance(truth, entry), "of the anchor's image" if image_anchor else "of this image")
        picture = found.get((entry["negative_shard"], entry["negative_key"]))
        cards.append(card(picture, entry["negative_caption"], lines=_similarities(entry), badge=badge, good=good))
    anchor: Card = card(
        found.get((first["anchor_shard"], first["anchor_key"])), first["anchor_caption"], badge="anchor", lines=()
    )
    return Strip(f"anchor {clean(first['anchor_key'], 60)}", cards, anchor, heading)


def _tiles(group: Sequence[dict[str, Any]], found: Pictures, truth: SceneTruth | None) -> list[Tile]:
    first = group[0]
    anchor = found.get((first["anchor_shard"], first["anchor_key"]))
    tiles = [Tile(anchor, (clean(first["anchor_caption"]),), ("anchor",), FIRST)]
    for entry in group:
        badge, good = verdict(_relevance(truth, entry), "of the picture")
        lines = [", ".join(_similarities(entry)[:1] + ([badge] if badge else [])), ", ".join(_similarities(entry)[1:])]
        picture = found.get((entry["negative_shard"], entry["negative_key"]))
        tiles.append(Tile(picture, (clean(entry["negative_caption"]),), lines, MARKED if good else PLAIN))
    return tiles


def _strength(weight: float) -> float:
    """Return the opacity of a cell's shade; it saturates at weights of 0.1 and 3."""
    if weight < 1:
        return _STRONGEST * min(1.0, np.log10(1 / max(weight, 1e-4)))
    return _STRONGEST * min(1.0, np.log(weight) / np.log(3.0))


def _cell(batch: MiniBatch, row: int, column: int, relevance: float | None) -> Cell:
    if row == column:
        return Cell("own pair")
    if not batch.negatives[row, column]:
        return Cell("duplicate")
    weight = batch.image_to_text[row, column]
    colour = ", ".join(map(str, _LIGHT if weight < 1 else _HEAVY))
    return Cell(shown(weight, 2), f"rgba({colour}, {_strength(weight):.2f})", "true" if relevance == 1.0 else "")


def _drawn(cell: Cell, batch: MiniBatch, row: int, column: int) -> tuple[str, tuple[int, int, int] | None]:
    """Return a cell's text and its shade blended with white, for the PNG."""
    if not cell.shade:
        return cell.text, None
    weight = batch.image_to_text[row, column]
    opacity, colour = _strength(weight), _LIGHT if weight < 1 else _HEAVY
    red, green, blue = (round(255 + (part - 255) * opacity) for part in colour)
    return f"{cell.text}\n{cell.note}" if cell.note else cell.text, (red, green, blue)


_QUERIES, _TOP = 6, 5
_KS = (1, 5, 10)


@dataclass(frozen=True)
class RunRanking:
    """Text to image ranking of one run: (n, n) scores, and the average precision of each query."""

    name: str
    scores: np.ndarray
    precision: np.ndarray


def side_by_side(
    sides: Sequence[tuple[str, Pairs]], find: FindPictures, truth: SceneTruth | None, folder: Path
) -> Section:
    """Compare retrieval of two runs. sides: (name, the same pairs under its run), twice."""
    pairs = sides[0][1]
    relevant = relevance_of(pairs, truth)
    rankings = [ranking(name, side, relevant) for name, side in sides]
    differ = np.abs(rankings[0].precision - rankings[1].precision)
    queries = np.argsort(-differ, kind="stable")[:_QUERIES]
    shares = {r.name: figures(r.scores, relevant) for r in rankings}
    section = Section("retrieval", "Text → image retrieval, two runs")
    meaning = "every image that the text is true of" if truth is not None else "the text's own image"
    section.text = [
        f"Among {len(pairs)} held-out images, one text each; what counts as found is {meaning}. Below, the texts on "
        f"which the two runs differ most in average precision, with the first {_TOP} images of each."
    ]
    header = ["", *(f"R@{k}" for k in _KS), "mAP"]
    rows = [(clean(n), *(percent(f[f"R@{k}"]) for k in _KS), percent(f["mAP"])) for n, f in shares.items()]
    section.tables = [Table("Text → image on these pairs", header, rows)]
    tops = {(r.name, int(q)): np.argsort(-r.scores[q], kind="stable")[:_TOP] for r in rankings for q in queries}
    wanted = sorted({(pairs.shards[i], pairs.keys[i]) for top in tops.values() for i in top})
    found = find(wanted)
    drawn: list[tuple[str, list[Tile]]] = []
    listed = []
    for query in map(int, queries):
        text = clean(pairs.captions[query], 160)
        runs: dict[str, dict[str, object]] = {}
        listed.append({"key": pairs.keys[query], "caption": pairs.captions[query], "runs": runs})
        for each in rankings:
            top = tops[each.name, query]
            title = f"{clean(each.name, 60)}: average precision {shown(each.precision[query], 2)}"
            cards, tiles = [], []
            for place, image in enumerate(map(int, top), start=1):
                good = bool(relevant[query, image])
                line = f"{place}. score {each.scores[query, image]:.2f}"
                badge = ("true" if truth is not None else "its own image") if good else ""
                picture = found.get((pairs.shards[image], pairs.keys[image]))
                cards.append(card(picture, pairs.captions[image], lines=[line], badge=badge, good=good or None))
                lines = [f"{line}, {badge}" if badge else line]
                tiles.append(Tile(picture, (clean(pairs.captions[image]),), lines, MARKED if good else PLAIN))
            section.strips.append(Strip(title, cards, heading="" if runs else f"“{text}”"))
            drawn.append((f"“{text}” · {title}", tiles))
            runs[each.name] = {
                "average_precision": float(each.precision[query]),
                "images": [pairs.keys[i] for i in top],
                "scores": each.scores[query, top],
                "true": relevant[query, top],
            }
    draw_rows(drawn, folder / "retrieval.png")
    section.numbers = {"pairs": len(pairs), "figures": shares, "queries": listed, "picture": "pictures/retrieval.png"}
    return section


def relevance_of(pairs: Pairs, truth: SceneTruth | None) -> np.ndarray:
    """(texts, images) bool: known truth, or the own image and those that share an id with it."""
    relevant = (pairs.pair_ids[:, None] == pairs.pair_ids[None]).any(-1)
    if truth is not None:
        relevant |= truth.table(pairs.keys, pairs.captions) == 1.0
    np.fill_diagonal(relevant, True)
    return relevant


def ranking(name: str, pairs: Pairs, relevant: np.ndarray) -> RunRanking:
    """Scores of all images for each text, and average precision per query."""
    scores = np.asarray(pairs.text) @ np.asarray(pairs.image).T
    precision = [mean_average_precision(scores[i : i + 1], relevant[i : i + 1]) for i in range(len(pairs))]
    return RunRanking(name, scores, np.array(precision))


def figures(scores: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Recall at k and mAP, fractions."""
    recalls = recall_at_k(scores, relevant, _KS)
    return {**{f"R@{k}": recalls[k] for k in _KS}, "mAP": mean_average_precision(scores, relevant)}
