"""Batches of questions with their weighted answers, to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sacl_ds.data.batch import ImageView, Movable, TextView, part_of
from sacl_ds.data.collate import stacked
from sacl_ds.data.draws import hash64
from sacl_ds.data.images import BadImage
from sacl_ds.data.order import Place
from sacl_ds.data.sample import BadSample, SampleFault
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.tasks.vqa.data import Question, answer_weights


@dataclass(frozen=True)
class QuestionBatch(Movable):
    """Batch of b questions with A answers in all.

    L, La: tokens of the longest question and answer, [CLS] and [SEP] included.
    """

    keys: list[str]
    images: Tensor  # (b, 3, H, W) uint8
    input_ids: Tensor  # (b, L) int64
    attention_mask: Tensor  # (b, L) int64
    answer_ids: Tensor  # (A, La) int64
    answer_mask: Tensor  # (A, La) int64
    answer_weight: Tensor  # (A,) float32
    answer_question: Tensor  # (A,) int64: the row that it answers
    pair_ids: Tensor  # (b, 1) int64
    faults: list[SampleFault] = field(default_factory=list)  # questions that others of this batch stand in for

    def __len__(self) -> int:
        return len(self.keys)

    def parts(self, rows: int) -> list[QuestionBatch]:
        """Split the questions in order into micro-batches of `rows`, with their answers. Call it on the host: it looks
        at lengths."""
        made = []
        for start in range(0, len(self), rows):
            own = (self.answer_question >= start) & (self.answer_question < start + rows)
            answers = {name: getattr(self, name)[own] for name in ("answer_ids", "answer_mask", "answer_weight")}
            longest = int(answers["answer_mask"].sum(1).max())
            answers |= {name: answers[name][:, :longest] for name in ("answer_ids", "answer_mask")}
            answers["answer_question"] = self.answer_question[own] - start
            questions = part_of(self, slice(start, start + rows), {"attention_mask": ("input_ids",)})
            made.append(QuestionBatch(**questions | answers))
        return made


@dataclass(frozen=True, slots=True)
class QuestionItem:
    """Transformed question, before it is collated."""

    key: str
    image: Tensor  # (3, H, W) uint8
    question: str
    answers: dict[str, float]


@dataclass(frozen=True)
class QuestionCollator:
    """Makes batches of questions. What is random about a question is drawn from (seed, epoch, its key).

    image_view: returns the transform for a question with all its answers; it may leave out mirroring where they speak
    of left or right. Questions reach the tokenizer as they are: it lower-cases them, and sets punctuation apart as it
    did with the captions of pre-training (ALBEF, whose captions were stripped of it, strips its questions as well).
    """

    tokenizer: TextView
    image_view: Callable[[str], ImageView]
    seed: int

    def item(self, question: Question, place: Place) -> QuestionItem:
        """Raises BadSample where the image is missing or damaged, or no answer is known."""
        answers = answer_weights(question)
        if not answers:
            raise BadSample(SampleFault("bad", "", question.key, "no answers to train on: it has no labels"))
        view = self.image_view(" ".join([question.question, *answers]))
        entropy = (self.seed, place.epoch, hash64(question.key.encode()))
        return QuestionItem(question.key, pixels(question, view, entropy), question.question, answers)

    def __call__(self, items: Sequence[QuestionItem], faults: Sequence[SampleFault] = ()) -> QuestionBatch:
        """Collate items to a batch. faults: questions that some of these stand in for."""
        asked = self.tokenizer.ids([item.question for item in items])
        said = self.tokenizer.ids([answer for item in items for answer in item.answers])
        keys = [item.key for item in items]
        return QuestionBatch(
            keys=keys,
            images=stacked([item.image for item in items]),
            input_ids=torch.from_numpy(pad(asked, self.tokenizer.pad_id)),
            attention_mask=torch.from_numpy(attention_mask(asked)),
            answer_ids=torch.from_numpy(pad(said, self.tokenizer.pad_id)),
            answer_mask=torch.from_numpy(attention_mask(said)),
            answer_weight=torch.tensor([weight for item in items for weight in item.answers.values()]),
            answer_question=torch.tensor([row for row, item in enumerate(items) for _ in item.answers]),
            pair_ids=torch.from_numpy(np.array([[hash64(key.encode())] for key in keys], np.uint64).view(np.int64)),
            faults=list(faults),
        )

    def join(self, parts: Sequence[QuestionBatch]) -> QuestionBatch:
        """Concatenate batches, padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        first_rows = np.cumsum([0, *map(len, parts)])
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("images", "answer_weight")}
        for name, fill in (
            ("input_ids", self.tokenizer.pad_id),
            ("attention_mask", 0),
            ("answer_ids", self.tokenizer.pad_id),
            ("answer_mask", 0),
        ):
            each = [getattr(part, name) for part in parts]
            longest = max(part.shape[1] for part in each)
            joined[name] = torch.cat(
                [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in each]
            )
        return QuestionBatch(
            keys=[key for part in parts for key in part.keys],
            answer_question=torch.cat(
                [part.answer_question + int(first) for part, first in zip(parts, first_rows[:-1], strict=True)]
            ),
            pair_ids=torch.cat([part.pair_ids for part in parts]),
            faults=[fault for part in parts for fault in part.faults],
            **joined,
        )


def pixels(question: Question, view: ImageView, entropy: tuple[int, ...]) -> Tensor:
    """Read and transform a question's image to (3, size, size) uint8. Raises BadSample where the image is missing or
    damaged."""
    try:
        return view(question.image.picture(), entropy)
    except BadImage as error:
        reason = f"the image cannot be decoded: {error}"
        raise BadSample(SampleFault("bad", "", question.key, reason)) from None
