"""Accuracy and consistency on NLVR2, as its official script defines them, and a model's predictions on all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sacl_ds.atomic import write_text
from sacl_ds.data.batch import ImageView, TextView
from sacl_ds.data.downstream.nlvr2 import Statement
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.evaluation.rounds import in_rounds, require_few, require_finite
from sacl_ds.model.nlvr2 import Nlvr2Model

CHANCE = 0.5


def group_of(identifier: str) -> str:
    """Return what statements of one sentence share: the identifier split-set-pair-sentence without its pair."""
    parts = identifier.split("-")
    return "-".join([*parts[:2], "", *parts[3:]])


def accuracy_and_consistency(
    identifiers: Sequence[str], labels: Sequence[bool], predictions: Sequence[bool]
) -> tuple[float, float]:
    """Share of statements that are judged right, and share of sentences all of whose statements are (fractions).

    After nlvr2/eval/metrics.py of lil-lab/nlvr, which calls the first precision: a sentence counts with those of its
    pairs that are there. Raises ValueError for none at all, or lists of different lengths.
    """
    right = [label == prediction for label, prediction in zip(labels, predictions, strict=True)]
    if not right or len(identifiers) != len(right):
        raise ValueError(f"need a label and a prediction each, got {len(identifiers)} identifiers, {len(right)} labels")
    failed = {group_of(identifier) for identifier, good in zip(identifiers, right, strict=True) if not good}
    groups = {group_of(identifier) for identifier in identifiers}
    return sum(right) / len(right), (len(groups) - len(failed)) / len(groups)


def chance_consistency(identifiers: Sequence[str]) -> float:
    """Expected consistency of guesses that are right half of the time."""
    sizes = Counter(map(group_of, identifiers))
    return sum(CHANCE**size for size in sizes.values()) / len(sizes)


@dataclass(frozen=True)
class Nlvr2Result:
    """Result of an NLVR2 evaluation.

    figures: {name: (value, chance)}, fractions; empty without labels. predictions: (identifier, verdict) of the
    statements whose images could be read, in order, and probabilities: what they were given to be true. notes: lines on
    what is missing.
    """

    figures: dict[str, tuple[float, float]]
    predictions: list[tuple[str, bool]]
    probabilities: list[float]
    notes: list[str]

    def write_predictions(self, path: Path) -> None:
        """Write the official CSV, `identifier,True` or `identifier,False` a line, atomically; one rank calls it."""
        write_text(path, "".join(f"{identifier},{verdict}\n" for identifier, verdict in self.predictions))


class _Seen(NamedTuple):
    """A statement with its images, each (3, H, W) uint8."""

    left: Tensor
    right: Tensor
    sentence: str


@torch.no_grad()
def evaluate_statements(
    model: Nlvr2Model,
    statements: Sequence[Statement],
    tokenizer: TextView,
    image_view: ImageView,
    device: torch.device,
    batch_size: int,
    done: Callable[[int], None] = lambda statements: None,
    max_bad_share: float = 0.0,
) -> Nlvr2Result:
    """Evaluate NLVR2 in eval mode and restore the model's mode. Every rank calls it and gets the same result.

    batch_size: statements in a pass of a rank. done(n): n statements more are done on this rank. Statements that have
    no label do not count in the figures, nor do those whose images cannot be read, in any way. Raises SharedError where
    these are more than the share max_bad_share.
    """

    def read(number: int) -> _Seen:
        statement = statements[number]
        return _Seen(*statement.views(image_view), statement.sentence)

    def run(seen: Sequence[_Seen]) -> list[float]:
        rows = tokenizer.ids([each.sentence for each in seen])  # here, on one thread: a tokenizer bears no more
        texts = (torch.from_numpy(array) for array in (pad(rows, tokenizer.pad_id), attention_mask(rows)))
        images = (torch.stack(list(side)) for side in ([s.left for s in seen], [s.right for s in seen]))
        logits = model(*(tensor.to(device) for tensor in (*images, *texts)))
        return logits.softmax(1)[:, 1].tolist()

    blank = torch.zeros(3, image_view.size, image_view.size, dtype=torch.uint8)
    filler = _Seen(blank, blank, "")
    was_training = model.training
    model.eval()
    try:
        rounds = in_rounds(len(statements), batch_size, read, run, filler, done)
    finally:
        model.train(was_training)
    spoiled = require_few(rounds.faults, len(statements), max_bad_share)
    judged = [
        (statement.identifier, statement.label, probability)
        for statement, probability in zip(statements, rounds.results, strict=True)
        if probability is not None
    ]
    require_finite(np.array([p for *_, p in judged]), [identifier for identifier, *_ in judged], "probabilities")
    notes = [spoiled] if spoiled else []
    return _result(judged, notes)


def _result(judged: Sequence[tuple[str, bool | None, float]], notes: list[str]) -> Nlvr2Result:
    """Summarise predictions. judged: identifier, label, and probability to be true."""
    known = [(identifier, label, p > CHANCE) for identifier, label, p in judged if label is not None]
    figures: dict[str, tuple[float, float]] = {}
    if known:
        identifiers, labels, verdicts = zip(*known, strict=True)
        accuracy, consistency = accuracy_and_consistency(identifiers, labels, verdicts)
        figures = {"accuracy": (accuracy, CHANCE), "consistency": (consistency, chance_consistency(identifiers))}
    if len(known) < len(judged):
        left_out = "no figures" if not known else "they do not count in the figures"
        notes = [*notes, f"{len(judged) - len(known)} of {len(judged)} statements have no label: {left_out}"]
    predictions = [(identifier, p > CHANCE) for identifier, _, p in judged]
    return Nlvr2Result(figures, predictions, [p for *_, p in judged], notes)
