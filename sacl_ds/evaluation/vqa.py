"""Official accuracy of VQA v2, and that of answers by the type of question alone.

Source: PythonEvaluationTools/vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sacl_ds.data.downstream.answers import normalise_answer, trimmed_answer
from sacl_ds.data.downstream.vqa import Question, answer_weights

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
