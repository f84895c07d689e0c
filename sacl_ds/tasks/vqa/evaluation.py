"""Official accuracy of VQA v2, and that of answers by the type of question alone.

Source: PythonEvaluationTools/vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sacl_ds.data.batch import ImageView, TextView
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.evaluation.rounds import in_rounds, require_few, require_finite
from sacl_ds.files import write_text
from sacl_ds.tasks.vqa.batch import pixels
from sacl_ds.tasks.vqa.data import Question, answer_weights, normalise_answer, trimmed_answer
from sacl_ds.tasks.vqa.model import VqaModel

__all__ = ["majority_answers", "majority_baseline", "normalise_answer", "vqa_accuracy"]

_ENOUGH = 3  # people who agree with an answer make it right


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """Return VQA accuracy in [0, 1]: the mean over the given answers of min(1, number of *others* equal to `answer` /
    3).

    given: what people answered, ten in VQA v2; any number works, but with fewer than four no answer can reach 1, and
    with one none more than 0. Spelling is normalised where the given answers differ; where they are all one, `answer`
    must equal it to the letter. Raises ValueError without any.
    """
    if not given:
        raise ValueError("no given answers to compare with")
    answer, given = trimmed_answer(answer), [trimmed_answer(each) for each in given]
    if len(set(given)) > 1:
        answer, given = normalise_answer(answer), [normalise_answer(each) for each in given]
    same = given.count(answer)
    differing = len(given) - same
    return (same * min(1.0, (same - 1) / _ENOUGH) + differing * min(1.0, same / _ENOUGH)) / len(given)


def majority_answers(train: Iterable[Question]) -> dict[str, str]:
    """Find the most frequent answer to each type of question, and under "" the one of all; ties by the alphabet.

    Every question counts once, shared among its answers. Questions without labels are passed over.
    """
    totals: dict[str, Counter[str]] = {"": Counter()}
    for question in train:
        weights = answer_weights(question)
        for kind in {question.kind, ""}:
            totals.setdefault(kind, Counter()).update(weights)  # type: ignore[arg-type]  # floats add up as well
    return {
        kind: min(total, key=lambda answer: (-round(total[answer], 9), answer))
        for kind, total in totals.items()
        if total
    }


def majority_answer(answers: Mapping[str, str], kind: str) -> str:
    """Look up a question's type in `majority_answers`; an unknown type gets the most frequent answer of all."""
    return answers.get(kind, answers.get("", ""))


def majority_baseline(train: Iterable[Question], held_out: Iterable[Question]) -> float:
    """Return the `vqa_accuracy` on `held_out` of the most frequent answer to each type of question in `train`.

    NaN where none of `held_out` has labels.
    """
    answers = majority_answers(train)
    found = [vqa_accuracy(majority_answer(answers, each.kind), each.answers) for each in held_out if each.answers]
    return sum(found) / len(found) if found else float("nan")


@dataclass(frozen=True)
class VqaResult:
    """Result of a VQA evaluation.

    figures: {name: (value, chance)}, fractions: `accuracy`, and `accuracy/...` for each type of answer and of question;
    chance is that of the most frequent answer to the type of question, NaN where that is not known. Empty without
    labels. predictions: {"question_id", "answer"} each, in the questions' order, without those whose image cannot be
    used. scores: the log-likelihood of each. notes: what a reader of the figures should know.
    """

    figures: dict[str, tuple[float, float]]
    predictions: list[dict[str, Any]]
    scores: list[float]
    notes: list[str]

    def write_predictions(self, path: Path) -> None:
        """Write the official result JSON, atomically. One rank calls it: all hold the same."""
        write_text(path, json.dumps(self.predictions))


class _Answered(NamedTuple):
    """Outcome of a question. accuracy, chance: NaN where they are not known."""

    question_id: int
    kinds: tuple[str, ...]
    answer: str
    score: float
    accuracy: float
    chance: float


class _LoadedQuestion(NamedTuple):
    question: Question | None
    image: Tensor
    text: str


@torch.no_grad()
def evaluate_questions(
    model: VqaModel,
    questions: Sequence[Question],
    tokenizer: TextView,
    image_view: ImageView,
    device: torch.device,
    batch_size: int,
    answers: Sequence[str],
    top: int = 128,
    done: Callable[[int], None] = lambda examples: None,
    max_bad_share: float = 0.0,
    baseline: Mapping[str, str] | None = None,
) -> VqaResult:
    """Every rank calls it and gets the same. The best of `answers` to each question, in eval mode, which is restored.

    top: candidates that are ranked by their full likelihood (ALBEF: 128). baseline: from `majority_answers`. done(n): n
    questions more are done on this rank. Raises SharedError where images of more than the share max_bad_share cannot
    be used, ValueError without answers to choose from.
    """
    if not answers:
        raise ValueError("no answers to choose from")
    rows = tokenizer.ids(answers)
    candidates = torch.from_numpy(pad(rows, tokenizer.pad_id)).to(device)
    candidate_mask = torch.from_numpy(attention_mask(rows)).to(device)

    def read(number: int) -> _LoadedQuestion:
        question = questions[number]
        return _LoadedQuestion(question, pixels(question, image_view, ()), question.question)

    def run(asked: Sequence[_LoadedQuestion]) -> list[_Answered]:
        ids = tokenizer.ids([each.text for each in asked])  # here, on one thread: a tokenizer bears no more
        mask = torch.from_numpy(attention_mask(ids)).to(device)
        images = torch.stack([each.image for each in asked]).to(device)
        states = model.encode_question(images, torch.from_numpy(pad(ids, tokenizer.pad_id)).to(device), mask)
        ranking = model.rank_answers(states, mask, candidates, candidate_mask, top)
        chosen = zip(ranking.best.tolist(), ranking.scores[:, 0].tolist(), strict=True)
        return [
            _judged(each.question, answers[best], score, baseline)
            for each, (best, score) in zip(asked, chosen, strict=True)
            if each.question is not None
        ]

    filler = _LoadedQuestion(None, torch.zeros(3, image_view.size, image_view.size).byte(), "")
    was_training = model.training
    model.eval()
    try:
        results, faults = in_rounds(len(questions), batch_size, read, run, filler, done)
    finally:
        model.train(was_training)
    bad = require_few(faults, len(questions), max_bad_share)
    answered = [each for each in results if each is not None]
    require_finite(np.array([each.score for each in answered]), [str(each.question_id) for each in answered], "scores")
    figures = _figures(answered)
    notes = [bad] if bad else []
    notes += [*_alike(answers, rows), *_unknown(answers, questions)]
    if not figures:
        notes.append("no labels: no accuracy; the predictions can be judged where the labels are")
    return VqaResult(
        figures,
        [{"question_id": each.question_id, "answer": each.answer} for each in answered],
        [each.score for each in answered],
        notes,
    )


def _judged(question: Question, answer: str, score: float, baseline: Mapping[str, str] | None) -> _Answered:
    accuracy = chance = float("nan")
    if question.answers:
        accuracy = vqa_accuracy(answer, question.answers)
        if baseline is not None:
            chance = vqa_accuracy(majority_answer(baseline, question.kind), question.answers)
    kinds = tuple(dict.fromkeys(kind for kind in (question.answer_type, question.kind) if kind))
    return _Answered(question.question_id, kinds, answer, score, accuracy, chance)


def _figures(answered: Sequence[_Answered]) -> dict[str, tuple[float, float]]:
    """Average over the questions that have labels, overall first."""
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for each in answered:
        if not np.isnan(each.accuracy):
            for name in ("accuracy", *(f"accuracy/{kind}" for kind in each.kinds)):
                groups[name].append((each.accuracy, each.chance))
    means = {name: np.mean(groups[name], axis=0) for name in sorted(groups)}
    return {name: (float(value), float(chance)) for name, (value, chance) in means.items()}


def _unknown(answers: Sequence[str], questions: Sequence[Question]) -> list[str]:
    """Return no line, or one where no answer that people gave to a question is among those to choose from."""
    known = set(answers)
    lost = [each for each in questions if each.answers and known.isdisjoint(answer_weights(each))]
    if not lost:
        return []
    named = f"{lost[0].key}, for example, was answered {', '.join(map(repr, sorted(set(lost[0].answers))[:3]))}"
    return [
        f"to {len(lost)} of {len(questions)} questions nobody gave an answer of the list, so they are lost: {named}"
    ]


def _alike(answers: Sequence[str], rows: Sequence[Sequence[int]]) -> list[str]:
    """Return no line, or one where answers have the same tokens, so that only the first of them is ever given."""
    counts = Counter(map(tuple, rows))
    alike = [answer for answer, row in zip(answers, rows, strict=True) if counts[tuple(row)] > 1]
    if not alike:
        return []
    named = ", ".join(map(repr, alike[:3])) + (", ..." if len(alike) > 3 else "")
    return [f"{len(alike)} answers of the list have the same tokens as another and cannot be told apart: {named}"]
