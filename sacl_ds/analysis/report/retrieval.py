"""Text→image retrieval of two runs side by side (paper Fig. 5 and 6), on the queries where they differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sacl_ds.analysis.pairs import Pairs
from sacl_ds.analysis.report.examples import FindPictures
from sacl_ds.analysis.report.page import Section, Strip, Table, card, clean, percent, shown
from sacl_ds.analysis.report.truth import SceneTruth
from sacl_ds.evaluation.metrics import mean_average_precision, recall_at_k
from sacl_ds.telemetry.sheet import MARKED, PLAIN, Tile, draw_rows

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
                tiles.append(Tile(picture, clean(pairs.captions[image]), lines, MARKED if good else PLAIN))
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
