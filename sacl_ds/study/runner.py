"""Runs a plan's trials in several processes, each behind its teacher's; what is done already is not done again."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from sacl_ds.errors import UserError
from sacl_ds.study.plan import Plan
from sacl_ds.study.pools import vocabulary
from sacl_ds.study.recognition import trained_stem
from sacl_ds.study.trial import Folder, run_trial

Trial = tuple[str, int]  # arm and seed


def finished(plan: Plan, folder: Folder) -> dict[Trial, dict[str, Any]]:
    """Results of the plan's trials that are there."""
    found = {}
    for name in plan.arms:
        for seed in plan.seeds:
            path = folder.result(plan.fingerprint(name, seed))
            if path.exists():
                found[name, seed] = json.loads(path.read_text())
    return found


def run_plan(
    plan: Plan, folder: Folder, processes: int, device: str, done: Callable[[Trial, dict[str, Any]], None]
) -> None:
    """Run what is missing; `done` is called after each trial. Seeds come one after the other, so that a study that is
    stopped has whole seeds. Raises UserError where a trial fails; those that run beside it are finished first."""
    trained_stem(plan.common.stem, folder.cache)
    vocabulary(folder.cache)
    waiting = _missing(plan, folder)
    running: dict[Future[dict[str, Any]], Trial] = {}
    failed: tuple[Trial, BaseException] | None = None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (max(1, torch.get_num_threads() // processes),)) as workers:
        while running or (waiting and failed is None):
            for trial in [] if failed else _ready(plan, folder, waiting)[: processes - len(running)]:
                waiting.remove(trial)
                running[workers.submit(run_trial, plan, *trial, folder, device)] = trial
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                trial = running.pop(future)
                if (error := future.exception()) is not None:
                    failed = failed or (trial, error)
                else:
                    done(trial, future.result())
    if failed is None:
        return
    (name, seed), error = failed
    if isinstance(error, BrokenProcessPool):
        error = RuntimeError("its process was killed, for want of memory?")
    raise UserError(f"arm {name}, seed {seed} failed: {error}; what is finished is kept in {folder.root}") from error


def _missing(plan: Plan, folder: Folder) -> list[Trial]:
    """A trial a fingerprint: arms with the same settings under two names are trained once. A teacher whose weights are
    gone is trained anew."""
    teachers = {arm.teacher for arm in plan.arms.values()}
    missing, known = [], set()
    for seed in plan.seeds:
        for name in plan.ordered():
            fingerprint = plan.fingerprint(name, seed)
            there = folder.result(fingerprint).exists() and (
                name not in teachers or folder.weights(fingerprint).exists()
            )
            if not there and fingerprint not in known:
                known.add(fingerprint)
                missing.append((name, seed))
    return missing


def _ready(plan: Plan, folder: Folder, waiting: list[Trial]) -> list[Trial]:
    """Those whose teacher is trained."""
    return [
        (name, seed)
        for name, seed in waiting
        if all(
            folder.result(plan.fingerprint(teacher, seed)).exists()
            and folder.weights(plan.fingerprint(teacher, seed)).exists()
            for teacher in plan.chain(name)[:1]
        )
    ]


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
