"""NLVR2 as a task, with accuracy and consistency as its official script defines them, on all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.batch import ImageView, TextView
from sacl_ds.data.text import Tokenizer, attention_mask, pad
from sacl_ds.evaluation.rounds import in_rounds, require_few, require_finite
from sacl_ds.files import write_text
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.examples import ExampleSource, images_folder, scenes_of
from sacl_ds.tasks.nlvr2.data import (
    SceneStatements,
    Statement,
    StatementCollator,
    nlvr2_statements,
    scene_statements,
)
from sacl_ds.tasks.nlvr2.model import Nlvr2Model, Nlvr2Objective
from sacl_ds.tasks.task import EvaluationContext, Outcome, Task

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


class Nlvr2Outcome:
    def __init__(self, result: Nlvr2Result) -> None:
        self.figures, self.notes, self._result = result.figures, result.notes, result

    def write(self, folder: Path) -> list[Path]:
        path = folder / "predictions.csv"
        self._result.write_predictions(path)
        return [path]


class Nlvr2Task(Task):
    rows = "statements"
    origin = "both blocks of a fusion layer start as copies of it, classifier.* is new"
    main = "accuracy"

    def __init__(self, run: FinetuneConfig) -> None:
        super().__init__(run)
        self._statements = cache(self._read)

    def count(self, split: str) -> int:
        return len(self._statements(split))

    def labelled(self, split: str) -> bool:
        return any(statement.label is not None for statement in self._statements(split))

    def _read(self, split: str) -> Sequence[Statement]:
        if self.run.data.source == "scenes":
            scenes = scenes_of(self.run, split)
            return SceneStatements(scenes) if split == "train" else scene_statements(scenes)
        file = getattr(self.run.nlvr2, split)
        return [] if file is None else nlvr2_statements(Path(file), images_folder(self.run))

    def texts(self) -> Iterator[str]:
        return (statement.sentence for statement in islice(self._statements("train"), 100_000))

    def training(self, tokenizer: Tokenizer) -> tuple[ExampleSource, StatementCollator]:
        collator = StatementCollator(tokenizer, self.training_view().for_text, self.run.seed)
        return ExampleSource(self._statements("train")), collator

    def model(self, start: SaclModel, tokenizer: Tokenizer) -> Nlvr2Model:
        return Nlvr2Model(start, self.run.model)

    def objective(self, model: Nlvr2Model) -> nn.Module:
        return Nlvr2Objective(model)

    def evaluate(self, model: Nlvr2Model, split: str, seen: EvaluationContext) -> Outcome:
        statements = self._statements(split)[: seen.limit]
        result = evaluate_statements(
            model,
            statements,
            seen.tokenizer,
            self.held_out_view(),
            seen.device,
            self.run.batch_size,
            seen.counted("judging", len(statements)),
            self.run.data.max_bad_share,
        )
        return Nlvr2Outcome(result)
