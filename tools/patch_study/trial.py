"""Trials of the study of patch selection, several at a time, with results kept; and timing of its arms."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from weight_study.cache import keep_tensors, kept_tensors
from weight_study.runner import keep, results

from patch_study.plan import PatchArm, PatchPlan, Sizes, TaskName
from patch_study.start import image_start, pictures
from patch_study.tasks import StudyTask, build, trial_scenes
from sacl_ds.config import OptimConfig
from sacl_ds.training.schedules import learning_rate_factor

Trial = tuple[str, int]  # arm and seed
_START_SEED = 500
_TRIALS = "trials.jsonl"


def finished(plan: PatchPlan, folder: Path) -> dict[Trial, dict[str, Any]]:
    """Read the results of the plan's trials from `folder`."""
    known = results(folder / _TRIALS)
    trials = {(name, seed): plan.fingerprint(name, seed) for seed in plan.seeds for name in plan.arms}
    return {trial: known[fingerprint] for trial, fingerprint in trials.items() if fingerprint in known}


def run_plan(plan: PatchPlan, folder: Path, processes: int, done: Callable[[Trial, dict[str, Any]], None]) -> None:
    """Run what is missing, seed after seed, the tasks' starts first; `done` is called after each trial."""
    there = finished(plan, folder)
    missing = [(name, seed) for seed in plan.seeds for name in plan.arms if (name, seed) not in there]
    for seed in {_START_SEED, *(seed for _, seed in missing)} if missing else ():
        for scenes in trial_scenes(plan.sizes, seed):
            pictures(scenes, folder)  # before two trials would draw them at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all processes
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as workers:
        if missing:
            workers.submit(image_start, plan.sizes, folder).result()
        tasks = {plan.arms[name].task for name, _ in missing}
        for started in [workers.submit(task_start, task, plan.sizes, folder) for task in sorted(tasks)]:
            started.result()
        running = {workers.submit(run_trial, plan, *trial, folder): trial for trial in missing}
        for future in as_completed(running):
            result = future.result()
            keep(result, folder / _TRIALS)
            done(running[future], result)


def task_start(kind: TaskName, sizes: Sizes, folder: Path) -> Path:
    """Load a task's module that learned it with all patches from `folder`, or train it and save it there."""
    path = folder / f"start-{kind}-{sizes.start_fingerprint(kind)}.safetensors"
    if not path.exists():
        task = build(PatchArm(task=kind), sizes, _START_SEED, folder)
        _train(task, sizes, _START_SEED, sizes.start_steps[kind])
        keep_tensors(task.module.state_dict(), path)
        task.module.eval()
        path.with_suffix(".json").write_text(json.dumps(task.evaluate()))
    return path


def run_trial(plan: PatchPlan, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train an arm and return its metrics on held-out scenes, and how long it took."""
    start = time.perf_counter()
    figures = trained(plan, name, seed, folder).evaluate()
    seconds = time.perf_counter() - start
    return {"fingerprint": plan.fingerprint(name, seed), "arm": name, "seed": seed, **figures, "seconds": seconds}


def trained(plan: PatchPlan, name: str, seed: int, folder: Path) -> StudyTask:
    """Train the arm's way of choosing patches on the seed's scenes, from the task's start; returned in eval mode."""
    arm, sizes = plan.arms[name], plan.sizes
    task = build(arm, sizes, seed, folder)
    task.module.load_state_dict(kept_tensors(task_start(arm.task, sizes, folder)))
    _train(task, sizes, seed, sizes.steps[arm.task])
    task.module.eval()
    return task


def _train(task: StudyTask, sizes: Sizes, seed: int, steps: int) -> None:
    step = stepper(task, sizes)
    draws = torch.Generator().manual_seed(seed)
    for number in range(steps):
        torch.manual_seed(1_000_003 * seed + number)
        step(torch.randint(task.rows, (sizes.batch,), generator=draws), number, steps)


def stepper(task: StudyTask, sizes: Sizes) -> Callable[[Tensor, int, int], None]:
    """Return the function of one training step: (rows, number of the step, steps in all)."""
    named = list(task.module.named_parameters())
    groups = [
        {"params": [p for n, p in named if ("image_encoder." in n) == of_image], "peak": peak}
        for of_image, peak in ((True, sizes.lr_image), (False, sizes.lr_text))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = OptimConfig(warmup_steps=sizes.warmup)

    def step(rows: Tensor, number: int, steps: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(number, steps, schedule)
        loss = task.loss(rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
        optimizer.step()

    return step


def speeds(plan: PatchPlan, folder: Path, rounds: int = 30) -> dict[str, float]:
    """Measure the median seconds of each arm's training step, all in one process, one step of each in turn."""
    tasks = {name: build(arm, plan.sizes, 0, folder) for name, arm in plan.arms.items()}
    steps = {name: stepper(task, plan.sizes) for name, task in tasks.items()}
    took: dict[str, list[float]] = {name: [] for name in tasks}
    draws = torch.Generator().manual_seed(0)
    for number in range(rounds + 2):
        for name, task in tasks.items():
            rows = torch.randint(task.rows, (plan.sizes.batch,), generator=draws)
            start = time.perf_counter()
            steps[name](rows, 100, 1000)
            if number >= 2:
                took[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in took.items()}
