"""NLVR2 task: is a statement about two images true?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

from torch import nn

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.downstream.examples import ExampleSource
from sacl_ds.data.downstream.nlvr2 import (
    SceneStatements,
    Statement,
    StatementCollator,
    nlvr2_statements,
    scene_statements,
)
from sacl_ds.data.text import Tokenizer
from sacl_ds.evaluation.nlvr2 import Nlvr2Result, evaluate_statements
from sacl_ds.model.nlvr2 import Nlvr2Model
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.files import images_folder, scenes_of
from sacl_ds.tasks.task import EvaluationContext, Outcome, Task
from sacl_ds.training.nlvr2 import Nlvr2Objective


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
