"""A run that is killed again and again at random moments, each time gone on with at other ranks and ZeRO stages."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import psutil
from faulty import Going

from sacl_ds.faults.restarts import read_status
from sacl_ds.telemetry.records import read
from sacl_ds.training.checkpoint_folder import FOLDER, LATEST

Victim = Literal["rank 0", "another rank", "a loader", "all"]
Moment = Literal["starting", "step", "writing", "naming", "removing"]
# of every ten kills, half while a checkpoint is saved
_MOMENTS: tuple[Moment, ...] = (
    "starting", "starting", "step", "step", "step", "writing", "writing", "writing", "naming", "removing"
)  # fmt: skip
LAUNCHER = 1.0  # seconds after which DeepSpeed's launcher sees that a rank has ended
_AHEAD = 4  # the most steps that a kill waits for


@dataclass(frozen=True)
class Plan:
    """One start and how it ends. every, keep: train.save_every and train.keep_checkpoints. ahead: steps, or saves, that
    are let pass; delay: of what the moment lasts."""

    ranks: int
    stage: int
    victim: Victim
    moment: Moment
    workers: int = 0
    every: int = 2
    keep: int | None = None
    ahead: int = 0
    delay: float = 0.5

    @property
    def arguments(self) -> list[str]:
        keep = "null" if self.keep is None else self.keep
        return [
            f"data.workers={self.workers}", f"train.save_every={self.every}", f"train.keep_checkpoints={keep}"
        ]  # fmt: skip


def plans(count: int, seed: int) -> list[Plan]:
    """Random ones; each ten have the same mixture of moments."""
    draw = random.Random(seed)
    made: list[Plan] = []
    while len(made) < count:
        made += [_plan(draw, moment) for moment in draw.sample(_MOMENTS, len(_MOMENTS))]
    return made[:count]


def _plan(draw: random.Random, moment: Moment) -> Plan:
    ranks, workers = draw.randint(1, 3), draw.randint(0, 1)
    victims: list[Victim] = ["rank 0", "all"]
    victims += ["another rank"] if ranks > 1 else []
    victims += ["a loader"] if workers and moment != "starting" else []  # which has none yet
    return Plan(
        ranks=ranks,
        stage=draw.randint(1, 3),
        victim=draw.choice(victims),
        moment=moment,
        workers=workers,
        every=draw.randint(1, 3),
        keep=draw.choice([1, 2]) if moment == "removing" else draw.choice([None, 2]),
        ahead=draw.randint(0, _AHEAD) if moment == "step" else draw.randint(0, 1),
        delay=draw.random(),
    )


@dataclass(frozen=True)
class Seen:
    """What one start has done to the checkpoints of its run, as they lie there at one moment; not what starts before it
    left half done."""

    writing: str | None
    files: int  # in the one that is being written
    removing: bool
    named: frozenset[str]
    latest: str | None

    @classmethod
    def of(cls, run_folder: Path, since: float) -> Seen:
        """since: when that start began, time.time()."""
        checkpoints = run_folder / FOLDER
        touched = [name for name in _listed(checkpoints) if _changed(checkpoints / name) >= since]
        writing = next((n for n in touched if n.startswith(".step_") and n.endswith(".writing")), None)
        inside = [_changed(checkpoints / writing / name) for name in _listed(checkpoints / writing)] if writing else []
        files = [changed for changed in inside if changed]  # without one that is gone by now
        if not files or min(files) < since:  # just made, or an old one that is swept away
            writing, files = None, []
        try:
            latest = (checkpoints / LATEST).read_text()
        except FileNotFoundError:
            latest = None
        return cls(
            writing,
            len(files),
            any(n.endswith(".removing") for n in touched),
            frozenset(n for n in touched if n.startswith("step_")),
            latest,
        )

    @property
    def phase(self) -> str:
        if self.writing:
            return f"writing, {self.files} files begun"
        if self.named and max(self.named) > (self.latest or ""):
            return "named, `latest` not yet written"
        return "removing old ones" if self.removing else ""


def _changed(path: Path) -> float:
    """When it was made or got its name, or something in it was made or removed; 0 where it is gone."""
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


@dataclass
class Paces:
    """Seconds that starts and saves of this run have taken so far, from which random moments within them are drawn."""

    starts: list[float] = field(default_factory=lambda: [4.0])
    saves: list[float] = field(default_factory=lambda: [0.05])

    def moment(self, of: list[float], delay: float) -> float:
        return delay * median(of[-9:])


class Log:
    """metrics.jsonl as the start that is about to come will write it: a file of its own, which first holds the lines up
    to the checkpoint. since: when it is about to come, time.time()."""

    def __init__(self, run_folder: Path, resumed_at: int) -> None:
        self._file, self.resumed_at = run_folder / "metrics.jsonl", resumed_at
        self._before = self._number()
        self.since = time.time()

    def _number(self) -> int | None:
        return self._file.stat().st_ino if self._file.exists() else None

    @property
    def step(self) -> int:
        """The last step; that of the checkpoint where this start has made none."""
        if self._number() == self._before:
            return self.resumed_at
        return max((line["step"] for line in read(self._file)), default=self.resumed_at)


@dataclass(frozen=True)
class Death:
    """What was killed, when, and how the run ended. before: the step of the checkpoint that `latest` named just before,
    None where there was none. guarded: whether ranks watched each other yet; else the launcher ends those left."""

    victims: list[int]  # processes
    ranks: list[int]  # of them, those that are ranks
    step: int
    phase: str
    before: int | None
    guarded: bool
    seconds: float
    codes: list[int]
    left: Seen


def kill(run: Going, plan: Plan, log: Log, paces: Paces) -> Death:
    """At the planned moment; then wait until no process of the run is left."""
    begun, first = time.monotonic(), log.resumed_at + 1
    if plan.moment == "starting":
        until = begun + paces.moment(paces.starts, plan.delay)
        run.wait(lambda: time.monotonic() > until or log.step >= first)
    else:
        run.wait(lambda: log.step >= first)
        paces.starts.append(time.monotonic() - begun)
    victims = _victims(run, plan)
    if plan.moment == "step":
        run.wait(lambda: log.step >= first + plan.ahead)
        time.sleep(0.1 * plan.delay)
    elif plan.moment != "starting":
        _await_save(run, plan, paces, log.since)
    seen, step = Seen.of(run.folder, log.since), log.step
    status = read_status(run.folder)
    for process in victims:
        os.kill(process, signal.SIGKILL)
    begun = time.monotonic()
    guarded = status is not None and status.process == run.pid(0)
    _await_end(run, guarded)
    seconds = time.monotonic() - begun
    starting = "starting" if guarded else "starting, before ranks watch each other"
    return Death(
        victims=victims,
        ranks=[rank for rank in range(plan.ranks) if run.pid(rank) in victims],
        step=step,
        phase=(seen.phase or "a step") if step >= first else starting,
        before=int(seen.latest.removeprefix("step_")) if seen.latest else None,
        guarded=guarded,
        seconds=seconds,
        codes=run.ended(1),
        left=Seen.of(run.folder, log.since),
    )


def _victims(run: Going, plan: Plan) -> list[int]:
    """Their process numbers, found beforehand: a look at the process table takes longer than a checkpoint its name."""
    draw = random.Random(plan.delay)
    if plan.victim == "rank 0":
        return [run.pid(0)]
    if plan.victim == "another rank":
        return [run.pid(draw.randrange(1, plan.ranks))]
    if plan.victim == "a loader":
        return [run.loader(draw.randrange(plan.ranks)).pid]
    children = [child.pid for rank in range(plan.ranks) for child in run.children(rank)]
    return [*(run.pid(rank) for rank in range(plan.ranks)), *children]


def _await_save(run: Going, plan: Plan, paces: Paces, since: float) -> None:
    """Look without a pause, since what is waited for may last a millisecond."""

    def wait(condition: Callable[[Seen], object]) -> Seen:
        end = time.monotonic() + 120
        while not condition(seen := Seen.of(run.folder, since)):
            assert time.monotonic() < end, run.said[-3000:]
        return seen

    def begun() -> str:
        """The name that the checkpoint that is being written will have."""
        return (wait(lambda seen: seen.writing).writing or "").removeprefix(".").removesuffix(".writing")

    def finished(tag: str) -> float:
        """Seconds until `latest` names it."""
        start = time.monotonic()
        wait(lambda seen: (seen.latest or "") >= tag)
        return time.monotonic() - start

    wait(lambda seen: not seen.writing)  # the one that is under way has been seen too late
    for _ in range(plan.ahead):
        paces.saves.append(finished(begun()))
    tag = begun()
    if plan.moment == "writing":
        time.sleep(paces.moment(paces.saves, plan.delay))
    elif plan.moment == "naming":
        wait(lambda seen: tag in seen.named)
    else:
        finished(tag)
        missed = time.monotonic() + 0.2
        wait(lambda seen: seen.removing or time.monotonic() > missed)


def _await_end(run: Going, guarded: bool) -> None:
    """Where ranks do not watch each other yet, their launcher does, which is played here."""
    if not guarded:
        time.sleep(LAUNCHER)
        for process in run.processes:
            if process.exitcode is None:
                process.terminate()
    run.wait(lambda: not processes_of(run), 60)


def processes_of(run: Going) -> list[psutil.Process]:
    """All that say what they have to say into its files: its ranks, their loaders, and whatever they started."""
    files = {str(run.out), str(run.err)}
    found = []
    for process in psutil.process_iter():
        try:
            if files & {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2)}:
                found.append(process)
        except OSError:
            continue
    return found
