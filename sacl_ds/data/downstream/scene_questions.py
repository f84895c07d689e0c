"""The built-in scenes as a VQA data set: each question has one right answer, which ten people agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from sacl_ds.data.downstream.scene_image import SceneImage
from sacl_ds.data.downstream.vqa import Question
from sacl_ds.data.draws import words
from sacl_ds.data.scenes import VERSION, Scenes

_PEOPLE = 10
_IDS_OF_A_SCENE = 100  # more than it has questions
_WHICH = 5  # what the draw is for; `Scenes` has the numbers before it


class SceneQuestions(Sequence[Question]):
    """Training questions: number i is about scene i, drawn by (seed, i). They are made when they are read."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        asked = self.scenes.questions(index)
        return _question(self.scenes, index, words(1, VERSION, self.scenes.seed, index, _WHICH)[0] % len(asked), asked)


def scene_questions(scenes: Scenes) -> list[Question]:
    """List all questions about all scenes, for evaluation."""
    made: list[Question] = []
    for index in range(len(scenes)):
        asked = scenes.questions(index)
        made += [_question(scenes, index, which, asked) for which in range(len(asked))]
    return made


def _question(scenes: Scenes, index: int, which: int, asked: Sequence[tuple[str, str, str]]) -> Question:
    kind, question, answer = asked[which]
    answer_type = "number" if kind == "count" else "yes/no" if answer in ("yes", "no") else "other"
    number = index * _IDS_OF_A_SCENE + which
    return Question(SceneImage(scenes, index), question, number, [answer] * _PEOPLE, kind, answer_type, answer)
