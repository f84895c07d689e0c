"""Scheduling of a plan's trials over processes, each after its teacher's; finished ones are not run again."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from sacl_ds.errors import UserError
from sacl_ds.files import parsed, signed
from weight_study.model import trained_stem, vocabulary
from weight_study.plan import Plan
from weight_study.trial import Folder, run_trial

Trial = tuple[str, int]  # arm and seed


def finished(plan: Plan, folder: Folder) -> dict[Trial, dict[str, Any]]:
    """Read the results of the plan's trials. Raises UserError."""
    known = results(folder.trials)
    trials = {(name, seed): plan.fingerprint(name, seed) for name in plan.arms for seed in plan.seeds}
    return {trial: known[fingerprint] for trial, fingerprint in trials.items() if fingerprint in known}


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all processes
    with ProcessPoolExecutor(processes, context, _start, (max(1, torch.get_num_threads() // processes),)) as workers:
        while running or (waiting and failed is None):
            ready = [] if failed else _ready(plan, folder, waiting, running.values())
            for trial in ready[: processes - len(running)]:
                waiting.remove(trial)
                running[workers.submit(run_trial, plan, *trial, folder, device)] = trial
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                trial = running.pop(future)
                if (error := future.exception()) is not None:
                    failed = failed or (trial, error)
                else:
                    keep(future.result(), folder.trials)
                    done(trial, future.result())
    if failed is None:
        return
    (name, seed), error = failed
    if isinstance(error, BrokenProcessPool):
        error = RuntimeError("its process was killed, for want of memory?")
    raise UserError(f"arm {name}, seed {seed} failed: {error}; what is finished is kept in {folder.root}") from error


def _missing(plan: Plan, folder: Folder) -> list[Trial]:
    """List the trials to run, teachers first; arms that are the same under two names once.

    A teacher whose weights are gone is trained anew where a student waits for it.
    """
    there = finished(plan, folder)
    missing: list[Trial] = []
    for seed in plan.seeds:
        wanted = [name for name in plan.ordered() if (name, seed) not in there]
        lost = {
            teacher
            for name in wanted
            for teacher in plan.chain(name)
            if not folder.weights(plan.fingerprint(teacher, seed)).exists()
        }
        first: dict[str, Trial] = {}
        for name in plan.ordered():
            if name in wanted or name in lost:
                first.setdefault(plan.fingerprint(name, seed), (name, seed))
        missing += first.values()
    return missing


def _ready(plan: Plan, folder: Folder, waiting: list[Trial], running: Collection[Trial]) -> list[Trial]:
    """List the waiting trials whose teacher is trained, and not being trained anew."""
    busy = {plan.fingerprint(*trial) for trial in (*waiting, *running)}
    return [
        (name, seed)
        for name, seed in waiting
        if all(
            folder.weights(fingerprint).exists() and fingerprint not in busy
            for fingerprint in (plan.fingerprint(teacher, seed) for teacher in plan.chain(name)[:1])
        )
    ]


def results(trials: Path) -> dict[str, dict[str, Any]]:
    """Read results by fingerprint, without a last line that was broken off.

    Raises UserError for a line that is no result, or not as it was written.
    """
    known = {}
    for number, line in enumerate(trials.read_text().split("\n")[:-1] if trials.exists() else [], 1):
        try:
            result = parsed(line)
            known[result["fingerprint"]] = result
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{trials}: line {number} is no result of a trial as it was written; remove it") from None
    return known


def keep(result: dict[str, Any], trials: Path) -> None:
    """Add a line, in the place of one that was broken off."""
    with trials.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{json.dumps(signed(result))}\n".encode())


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
