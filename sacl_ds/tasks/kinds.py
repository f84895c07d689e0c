"""The tasks there are, by name."""

from __future__ import annotations

from sacl_ds.config import FinetuneConfig
from sacl_ds.tasks.nlvr2 import Nlvr2Task
from sacl_ds.tasks.retrieval import RetrievalTask
from sacl_ds.tasks.task import Task
from sacl_ds.tasks.vqa import VqaTask

_TASKS: dict[str, type[Task]] = {"retrieval": RetrievalTask, "vqa": VqaTask, "nlvr2": Nlvr2Task}


def task_of(run: FinetuneConfig) -> Task:
    return _TASKS[run.task](run)
