"""Guard of a running job: requests to stop, heartbeats between its ranks, its status on the disk."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import psutil

from sacl_ds.errors import Fault, Stopped
from sacl_ds.faults.heartbeat import Address, Heartbeat, HeartbeatClient, HeartbeatServer, Limits
from sacl_ds.faults.restarts import Exit, Status, attempt, may_follow, read_status

_EVERY = 1.0  # seconds between looks at the launcher
_LAUNCHERS = ("deepspeed", "ds", "torchrun")
_MODULES = ("deepspeed.launcher", "torch.distributed.run", "torch.distributed.launch")
IMPATIENT = 2.0  # seconds after which a second Ctrl-C ends at once


class Requests:
    """First reason for which this process was asked to stop; None until then.

    Signals only set it: the run itself stops after a step, with a checkpoint.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._at = 0.0
        self._done = threading.Event()
        self._before: dict[int, object] = {}

    def listen(self, ends_alone: Callable[[], None], grace: float) -> None:
        """Install the signal handlers, from the main thread, and watch for the launcher's end.

        ends_alone: called where the launcher is gone and the process has not ended `grace` seconds later.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._signalled)
        parents = launchers()
        if parents:
            threading.Thread(target=self._watch, args=(parents, ends_alone, grace), name="parents", daemon=True).start()

    def close(self) -> None:
        self._done.set()
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        self._before.clear()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason, self._at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at > IMPATIENT:
            raise KeyboardInterrupt

    def _watch(self, parents: list[psutil.Process], ends_alone: Callable[[], None], grace: float) -> None:
        while not self._done.wait(_EVERY):
            if all(_lives(parent) for parent in parents):
                continue
            self.reason = self.reason or "its launcher has ended"
            if not self._done.wait(grace):
                ends_alone()
            return


def launchers() -> list[psutil.Process]:
    """List the ancestors that started this process: supervisor, launcher; on a remote node also the shell and sshd."""
    found: list[psutil.Process] = []
    try:
        for process in psutil.Process().parents():
            words, name = process.cmdline(), process.name()
            ours = any(Path(word).name in _LAUNCHERS for word in words[:3])
            ours = ours or any(module in word for word in words for module in _MODULES)
            supervises = os.environ.get("SACL_DS_SUPERVISOR") == str(process.pid)
            remote = bool(found) and name.startswith("sshd")
            if not (ours or supervises or remote):
                break
            found.append(process)
    except psutil.Error:
        pass
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


Doing = Literal["starting", "data", "step", "evaluation", "saving", "ending"]
_ALONE = 120.0  # seconds for a last checkpoint where the launcher is gone


@dataclass(frozen=True)
class Ranks:
    """This rank's place in the job, and communication between ranks.

    share: returns the first rank's object on every rank. together: a barrier.
    """

    rank: int
    world: int
    local_rank: int
    address: str  # of the first rank's machine
    share: Callable[[Any], Any]
    together: Callable[[], None]

    @property
    def speaks(self) -> bool:
        """Whether this rank reports the loss of the first one: one on each machine does, and the second of all."""
        return self.rank == 1 or self.local_rank == 0


class Guard:
    """Watches one run's ranks, on every rank: ends all of them when one fails, and keeps the run's status file.

    `requests` says whether the run was asked to stop.
    """

    def __init__(self, folder: Path, ranks: Ranks, limits: Limits, checkpoint: int | None) -> None:
        """Connect the ranks and begin the status file; every rank calls it. checkpoint: the step of the newest one.
        Raises Fault where the first rank cannot be reached."""
        self.requests = Requests()
        self._folder, self._ranks = folder, ranks
        self._place: tuple[int, Doing, float] = (checkpoint or 0, "starting", time.monotonic())
        self._checkpoint = checkpoint
        self._heartbeat: HeartbeatServer | HeartbeatClient | None = None
        first = ranks.rank == 0
        server = HeartbeatServer(ranks.address, self._now, limits, self._end, ranks.world) if first else None
        address: Address = ranks.share(server.address if server else None)
        self._start = address.token[:8]
        try:
            self._heartbeat = server or HeartbeatClient(address, self._now, limits, self._end, ranks.speaks)
        except OSError as error:
            raise Fault(
                f"rank {ranks.rank} cannot reach port {address.port} of rank 0 at {address.host}: {error}; open that "
                "machine's ports to the others (python -m sacl_ds.doctor --hostfile HOSTS checks it)"
            ) from None
        self.requests.listen(self._end_alone, _ALONE)
        self._write("running", begins=True)

    def at(self, step: int, doing: Doing) -> None:
        """Note what this rank is doing. step: how many are done."""
        self._place = step, doing, time.monotonic()

    def begin(self, checkpoint: int | None) -> None:
        """Begin a phase of the run, at that checkpoint of it; None: at its start."""
        self._checkpoint = checkpoint
        self.at(checkpoint or 0, "starting")

    def saved(self, step: int) -> None:
        """Note that a checkpoint of that step is on the disk."""
        self._checkpoint = step
        self._write("running")

    def finished(self) -> None:
        self._close()
        self._write("finished")

    def stopped(self, message: str) -> None:
        self._close()
        self._write("stopped", message)

    def failed(self, message: str, alone: bool, mistake: bool = False) -> None:
        """Report a mistake or fault that is about to be printed.

        alone: it is of this rank only, so that the others have to be told; mistake: they then end with that status,
        which no restart mends.
        """
        if alone and self._heartbeat:
            self._write("failed", message, by_any=True)
            self._heartbeat.say(message, mistake)
        elif self._heartbeat:
            self._write("failed", message)
            self._heartbeat.silence()
        self.requests.close()

    def let_the_first_speak(self, seconds: float) -> None:
        """After `failed`: the launcher ends all ranks when one has ended, so none does before the first has said why,
        and is done with the heartbeat."""
        if isinstance(self._heartbeat, HeartbeatClient):
            self._heartbeat.outlast(seconds)

    def wait_for_the_cause(self, seconds: float) -> None:
        """Wait after a failed collective, so that the heartbeat can end this process by the rank at fault."""
        time.sleep(seconds)

    def _close(self) -> None:
        """Stop watching, once no rank is to miss another any more."""
        if isinstance(self._heartbeat, HeartbeatClient):
            self._heartbeat.close()
        self._ranks.together()
        if isinstance(self._heartbeat, HeartbeatServer):
            self._heartbeat.close()
        self._heartbeat = None
        self.requests.close()

    def _now(self) -> Heartbeat:
        step, doing, since = self._place
        return Heartbeat(self._ranks.rank, socket.gethostname(), os.getpid(), step, doing, time.monotonic() - since)

    def _write(
        self,
        state: Literal["running", "finished", "stopped", "failed"],
        message: str = "",
        *,
        by_any: bool = False,
        begins: bool = False,
    ) -> None:
        if self._ranks.rank and not by_any:
            return
        if not begins and not may_follow(read_status(self._folder), self._start):
            return
        status = Status(state, self._place[0], self._checkpoint, message, attempt(), start=self._start)
        try:
            status.write(self._folder)
        except OSError as error:  # never the cause that a run ends
            print(f"warning: {self._folder}: its status cannot be written: {error}", file=sys.stderr, flush=True)

    def _end(self, said: str, speaks: bool, mistake: bool) -> None:
        """Print the verdict and end this process, from the heartbeat's thread, wherever the other threads are."""
        if speaks:
            if self._heartbeat and self._heartbeat.watch.stood_still:
                said = self._first_cause(said)
            before = f"--resume goes on from step {self._checkpoint}" if self._checkpoint else "there is no checkpoint"
            print(f"error: {said}; all ranks end; {before}", file=sys.stderr, flush=True)
            self._write("failed", said, by_any=True)
        _leave(Exit.MISTAKE if mistake else Exit.FAULT)

    def _first_cause(self, said: str) -> str:
        """Return the cause that the others ended by: a rank that stood still has seen their end alone."""
        there = read_status(self._folder)
        if there is None or may_follow(there, self._start) or (there.message in said and there.start == self._start):
            return said
        if there.start == self._start:
            return there.message
        return f"rank {self._ranks.rank} on {socket.gethostname()} stood still, and the run was started anew without it"

    def _end_alone(self) -> None:
        print(f"error: rank {self._ranks.rank}: its launcher has ended, and no step since", file=sys.stderr, flush=True)
        _leave(Exit.FAULT)


def _leave(status: Exit) -> None:
    """Kill all child processes and exit at once, from any thread."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.Error:
            continue
    os._exit(status)


_current: Guard | None = None


def current() -> Guard | None:
    """Return the guard of the run in this process."""
    return _current


@contextmanager
def guarding(folder: Path, ranks: Ranks, limits: Limits, checkpoint: int | None) -> Iterator[Guard]:
    """Guard a run; every rank enters the block.

    A failure inside is left to the command line to report, which then finds the guard by `current`; a request to stop
    is written to the status file here.
    """
    global _current  # noqa: PLW0603 (one process trains one run)
    _current = guard = Guard(folder, ranks, limits, checkpoint)
    try:
        yield guard
    except Stopped as stop:
        guard.stopped(str(stop))
        _current = None
        raise
    guard.finished()
    _current = None
