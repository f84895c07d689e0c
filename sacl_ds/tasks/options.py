"""Command lines of the tasks."""

from __future__ import annotations

import argparse

from sacl_ds.command_line import evaluation_parser, read_options, training_parser
from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.tasks.configuration import evaluation_config, finetune_config


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
