"""Downstream tasks by name."""

from __future__ import annotations

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.tasks.task import Task


def task_of(run: FinetuneConfig) -> Task:
    """Make the task that the configuration names; the others are not imported."""
    if run.task == "retrieval":
        from sacl_ds.tasks.retrieval import RetrievalTask

        return RetrievalTask(run)
    if run.task == "vqa":
        from sacl_ds.tasks.vqa import VqaTask

        return VqaTask(run)
    from sacl_ds.tasks.nlvr2 import Nlvr2Task

    return Nlvr2Task(run)
