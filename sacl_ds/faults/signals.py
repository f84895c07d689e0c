"""Requests to stop: SIGTERM and SIGINT, or a launcher that ended silently."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

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
