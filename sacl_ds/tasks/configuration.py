"""Configuration of a task: its defaults, the settings of the checkpoint's run, the YAML file, the arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sacl_ds.command_line import evaluation_parser, read_options, training_parser
from sacl_ds.config.finetune import TASKS, FinetuneConfig, task_defaults
from sacl_ds.config.room import user_path
from sacl_ds.config_file import Layer, merged, read_layers, read_yaml, resolve_layers
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError, nearest
from sacl_ds.model.placing import fill
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import TOKENIZER, WEIGHTS, finished_weights
from sacl_ds.model.starts.report import StartReport
from sacl_ds.model.starts.start import load_starts, tokenizer_source
from sacl_ds.model.starts.whole import place_run
from sacl_ds.tasks.task import Task
from sacl_ds.training.checkpoint_folder import read_checkpoint

CONFIG = "config.yaml"
_CHECKPOINTS = "checkpoints"
# of a fine-tuned run, what an evaluation of it takes over
_TAKEN_OVER = ("model", "seed", "data", "loss", *TASKS, "evaluation")
# where the model came from; its weights now come from the checkpoint
_ORIGIN: dict[str, Any] = {"start": None, "image_weights": None, "image_pretrained": False}


def finetune_config(task: str | None, file: str | None, overrides: list[str]) -> FinetuneConfig:
    """Resolve the configuration of a fine-tuning. task: what --task says. Raises UserError."""
    given = read_layers(file, overrides)
    said = merged(given)
    name = _task(task, said.get("task"))
    layers = _defaults(name, said)
    if said.get("checkpoint") is not None:
        layers.append(_model_of(run_of(str(said["checkpoint"]))))
    return resolve_layers([*layers, *given], FinetuneConfig)


def evaluation_config(task: str | None, file: str | None, overrides: list[str]) -> FinetuneConfig:
    """Resolve the configuration of an evaluation. Raises UserError.

    A fine-tuned run brings its own settings as defaults; a pre-training run can be evaluated on retrieval.
    """
    given = read_layers(file, overrides)
    said = merged(given)
    if said.get("checkpoint") is None:
        raise UserError(
            "checkpoint is missing: checkpoint=RUN, the directory of a finished run, or RUN/checkpoints/step_N"
        )
    folder = run_of(str(said["checkpoint"]))
    theirs = read_yaml(folder / CONFIG, f"checkpoint={folder}")
    if "task" in theirs:
        their_data = theirs.get("data")
        if not isinstance(their_data, dict) or "source" not in their_data:
            raise UserError(f"{folder / CONFIG} has no data.source; give the directory of a run")
        name = _task(task, said.get("task")) if task or "task" in said else str(theirs["task"])
        if name != theirs["task"]:
            raise UserError(
                f"--task {name}, but {folder} was fine-tuned for {theirs['task']}; evaluate that, or give "
                "another checkpoint"
            )
        before: list[Layer] = [(f"in {folder / CONFIG}", {key: theirs[key] for key in _TAKEN_OVER if key in theirs})]
        asked = said.get("data")
        if isinstance(asked, dict) and asked.get("source", their_data["source"]) != their_data["source"]:
            before = []  # its files or scenes are not those that are asked for
    else:
        name = _task(task, said.get("task"))
        if name != "retrieval":
            raise UserError(
                f"{folder} is a pre-training run, which answers nothing yet; fine-tune it first: "
                f"launch/finetune.py --task {name} checkpoint={folder}"
            )
        before = []
    layers = [*_defaults(name, said), *before, _model_of(folder)]
    return resolve_layers([*layers, *given], FinetuneConfig)


def run_of(checkpoint: str) -> Path:
    """Return the run directory that `checkpoint` is, or lies in. Raises UserError."""
    try:
        path = user_path(checkpoint)
        there = path.exists()
    except (OSError, ValueError):  # no name of a file
        raise UserError(f"checkpoint={checkpoint}: no such folder; correct the path") from None
    folder = path.parent.parent if path.parent.name == _CHECKPOINTS else path
    if there and path.is_file():
        raise UserError(
            f"checkpoint={checkpoint} is a file; give the directory of a run, or weights of elsewhere as model.start"
        )
    if not path.is_dir():
        raise UserError(f"checkpoint={checkpoint}: no such folder; correct the path")
    if not (folder / CONFIG).exists():
        raise UserError(
            f"checkpoint={checkpoint}: no {CONFIG} there; give the directory of a run, or its {_CHECKPOINTS}/step_N"
        )
    return folder


def _defaults(task: str, said: dict[str, Any]) -> list[Layer]:
    data = said.get("data")
    source = data.get("source", "scenes") if isinstance(data, dict) else "scenes"
    return [(f"in the defaults of {task}", task_defaults(task, source)), ("by --task", {"task": task})]


def _model_of(folder: Path) -> Layer:
    """Return the model settings of a run, to start from."""
    theirs = read_yaml(folder / CONFIG, f"checkpoint={folder}").get("model")
    if not isinstance(theirs, dict):
        raise UserError(f"{folder / CONFIG} has no room 'model'; give the directory of a run")
    return f"in {folder / CONFIG}", {"model": {**theirs, **_ORIGIN}}


def _task(option: str | None, said: Any) -> str:
    if option is not None and said is not None and option != said:
        raise UserError(f"--task {option}, but the configuration says task: {said}; leave one of them out")
    name = option if option is not None else said
    if name is None:
        raise UserError(f"--task is missing: {' or '.join(TASKS)}")
    if name not in TASKS:
        close = nearest(str(name), TASKS)
        raise UserError(f"--task {name}: choose {', '.join(TASKS)}{f' (did you mean {close}?)' if close else ''}")
    return str(name)


def read_finetune_options(purpose: str, example: str) -> tuple[argparse.Namespace, FinetuneConfig | None]:
    """Read the options of launch/finetune.py; None where the command line only asked something, now answered. Raises
    UserError."""

    def resolved(options: argparse.Namespace) -> FinetuneConfig:
        return finetune_config(options.task, options.config, options.overrides)

    return read_options(training_parser(purpose, example, task=True), resolved, FinetuneConfig)


def read_evaluation_options(purpose: str, example: str) -> FinetuneConfig | None:
    """Read the options of launch/evaluate.py; None where the command line only asked something, now answered. Raises
    UserError."""

    def resolved(options: argparse.Namespace) -> FinetuneConfig:
        return evaluation_config(options.task, options.config, options.overrides)

    return read_options(evaluation_parser(purpose, example), resolved, FinetuneConfig)[1]


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
