"""Read a checkpoint's weights, for training on and for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.config.paths import user_path
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.model.placing import fill
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import TOKENIZER, WEIGHTS, finished_weights
from sacl_ds.model.starts.report import StartReport
from sacl_ds.model.starts.start import load_starts, tokenizer_source
from sacl_ds.model.starts.whole import place_run
from sacl_ds.tasks.configuration import run_of
from sacl_ds.tasks.task import Task
from sacl_ds.training.saved_checkpoint import read_checkpoint


def saved_state(checkpoint: str) -> tuple[dict[str, Tensor], int | None]:
    """Read the weights of a finished run (the best it kept) or of its checkpoints/step_N, and their step if it is told.
    Raises UserError."""
    path, folder = user_path(checkpoint), run_of(checkpoint)
    if path != folder:
        state, stood = read_checkpoint(path)
        return state, stood.step
    if not (folder / WEIGHTS).exists():
        raise UserError(f"checkpoint={checkpoint}: no {WEIGHTS} there; give a finished run, or its checkpoints/step_N")
    return finished_weights(folder, f"checkpoint={checkpoint}"), None


def task_tokenizer(run: FinetuneConfig) -> Tokenizer | None:
    """Load the tokenizer of the model that the task starts from; None where one is to be trained. Raises UserError."""
    if run.checkpoint:
        return Tokenizer.load(run_of(run.checkpoint) / TOKENIZER, run.model.max_tokens, "checkpoint")
    source = tokenizer_source(run.model)
    return Tokenizer.load(source[0], run.model.max_tokens, source[1]) if source else None


def starting_model(run: FinetuneConfig, tokenizer: Tokenizer, resume: bool) -> tuple[SaclModel, StartReport | None]:
    """Build the pre-trained model that the task's is made of, the same on every rank.

    tokenizer: the task's; the model that it starts from may know fewer words. resume: all weights follow.
    """
    torch.manual_seed(run.seed)
    if resume:
        return SaclModel(run.model, tokenizer.size, pretrained=False), None
    begin = task_tokenizer(run) or tokenizer
    model = SaclModel(run.model, begin.size, pretrained=run.checkpoint is None)
    if run.checkpoint is None:
        return model, load_starts(model, run.model)
    state, _ = saved_state(run.checkpoint)
    source = place_run(model, run.model, run_of(run.checkpoint), state, f"checkpoint={run.checkpoint}")
    return model, StartReport(list(model.state_dict()), [source])


def trained_model(task: Task, tokenizer: Tokenizer, state: dict[str, Tensor], label: str) -> nn.Module:
    """Build the task's model with all of its weights from `state`. Raises UserError where they are not its own."""
    run = task.run
    model: Any = task.model(SaclModel(run.model, tokenizer.size, pretrained=False), tokenizer)
    fill(model, state, label, f": its weights are not of a model for {run.task} with these settings")
    return model
