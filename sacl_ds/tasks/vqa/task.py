"""Visual question answering: a decoder ranks a closed list of answers (ALBEF), scored as VQA v2 does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

from torch import nn

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.json_files import read_json
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.files import require_unchanged, write_text
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.examples import ExampleSource, images_folder, scenes_of
from sacl_ds.tasks.task import EvaluationContext, Outcome, Task
from sacl_ds.tasks.vqa.batch import QuestionCollator
from sacl_ds.tasks.vqa.data import (
    Question,
    SceneQuestions,
    answer_list,
    scene_questions,
    visual_genome_questions,
    vqa_questions,
    with_words,
)
from sacl_ds.tasks.vqa.evaluation import VqaResult, evaluate_questions, majority_answers
from sacl_ds.tasks.vqa.model import VqaModel, VqaObjective

ANSWERS = "answers.json"
_KNOWN_SCENES = 2000  # whose questions give the answers, the vocabulary and the most frequent answers


class VqaOutcome:
    def __init__(self, result: VqaResult) -> None:
        self.figures, self.notes, self._result = result.figures, result.notes, result

    def write(self, folder: Path) -> list[Path]:
        path = folder / "predictions.json"
        self._result.write_predictions(path)
        return [path]


class VqaTask(Task):
    rows = "questions"
    kept = (ANSWERS,)
    origin = "answer_decoder.* starts as a copy of the fusion encoder, word embeddings and MLM head"
    main = "accuracy"

    def __init__(self, run: FinetuneConfig) -> None:
        super().__init__(run)
        self._questions = cache(self._read)
        self._answers: list[str] | None = None
        self._baseline: dict[str, str] | None = None

    def count(self, split: str) -> int:
        return len(self._questions(split))

    def labelled(self, split: str) -> bool:
        return any(question.answers for question in self._questions(split))

    def _read(self, split: str) -> Sequence[Question]:
        if self.run.data.source == "scenes":
            scenes = scenes_of(self.run, split)
            return SceneQuestions(scenes) if split == "train" else scene_questions(scenes)
        settings = self.run.vqa
        if split == "val":
            return self._official("val", settings.val_questions, settings.val_annotations)
        if split == "test":
            return self._official("test", settings.test_questions, settings.test_annotations)
        asked = _listed(settings.train_questions)
        labels = _listed(settings.train_annotations)
        if len(asked) != len(labels):
            raise UserError(
                f"vqa.train_questions names {len(asked)} files and vqa.train_annotations {len(labels)}; each questions "
                "file needs its annotations"
            )
        pairs = zip(asked, labels, strict=True)
        questions = [question for files in pairs for question in self._official("train", *files)]
        if settings.visual_genome is not None:
            folder = images_folder(self.run, settings.visual_genome_images, "vqa.visual_genome_images")
            questions += visual_genome_questions(Path(settings.visual_genome), folder)
        return questions

    def _official(self, split: str, questions: str | None, annotations: str | None) -> list[Question]:
        if questions is None:
            if annotations is not None:
                raise UserError(f"vqa.{split}_annotations={annotations} needs vqa.{split}_questions beside it")
            return []
        labels = Path(annotations) if annotations is not None else None
        return vqa_questions(Path(questions), labels, images_folder(self.run))

    def _known(self) -> Sequence[Question]:
        """List the training questions, at most as many as are read for their answers."""
        if self.run.data.source == "files":
            return self._questions("train")
        scenes = self.run.data.scenes
        return scene_questions(Scenes(min(scenes.count, _KNOWN_SCENES), scenes.seed))

    @property
    def answers(self) -> list[str]:
        """Return the closed list of answers. Raises UserError where none is frequent enough, or the file is no list of
        texts."""
        if self._answers is None:
            named = self.run.vqa.answers
            self._answers = answer_list(self._known(), self.run.vqa.answers_at_least) if named is None else _read(named)
            if not self._answers:
                raise UserError(
                    f"no answer is the most frequent one of {self.run.vqa.answers_at_least} training questions; set "
                    "vqa.answers_at_least lower"
                )
        return self._answers

    @property
    def baseline(self) -> dict[str, str]:
        """Return the most frequent answer to each type of question."""
        if self._baseline is None:
            self._baseline = majority_answers(self._known())
        return self._baseline

    def keep(self, folder: Path) -> None:
        kept = {"answers": self.answers, "most_frequent": self.baseline}
        write_text(folder / ANSWERS, json.dumps(kept, indent=1))

    def take(self, folder: Path) -> None:
        require_unchanged(folder, f"checkpoint={folder}", ANSWERS)
        kept = read_json(folder / ANSWERS)
        try:
            self._answers, self._baseline = list(kept["answers"]), dict(kept["most_frequent"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / ANSWERS} is not what fine-tuning wrote: {error}") from None
        if self.run.vqa.answers is not None:
            self._answers = _read(self.run.vqa.answers)

    def texts(self) -> Iterator[str]:
        for question in islice(self._known(), 100_000):
            yield question.question
            yield from question.answers[:1]
        yield from self.answers

    def tokenizer(self, begin: Tokenizer) -> Tokenizer:
        """Extend the tokenizer so that it spells all answers, which the decoder would otherwise not tell apart."""
        return with_words(begin, self.answers)

    def training(self, tokenizer: Tokenizer) -> tuple[ExampleSource, QuestionCollator]:
        questions = self._questions("train")
        return ExampleSource(questions), QuestionCollator(tokenizer, self.training_view().for_text, self.run.seed)

    def model(self, start: SaclModel, tokenizer: Tokenizer) -> VqaModel:
        return VqaModel(start, self.run.model, tokenizer.size)

    def objective(self, model: VqaModel) -> nn.Module:
        return VqaObjective(model)

    def evaluate(self, model: VqaModel, split: str, seen: EvaluationContext) -> Outcome:
        questions = self._questions(split)[: seen.limit]
        result = evaluate_questions(
            model,
            questions,
            seen.tokenizer,
            self.held_out_view(),
            seen.device,
            self.run.batch_size,
            self.answers,
            self.run.vqa.ranked,
            seen.counted("answering", len(questions)),
            self.run.data.max_bad_share,
            self.baseline,
        )
        return VqaOutcome(result)


def _listed(files: str | list[str] | None) -> list[str]:
    return [files] if isinstance(files, str) else files or []


def _read(file: str) -> list[str]:
    answers = read_json(Path(file))
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers) or not answers:
        raise UserError(f"vqa.answers={file}: not a JSON list of texts")
    return answers
