"""Endings of a run: exit statuses, and the status file for a scheduler, since launchers swallow statuses."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Literal

from sacl_ds.atomic import write_text

FILE = "status.json"


class Exit(IntEnum):
    """Exit statuses of the training commands.

    MISTAKE: the user can put it right, and a restart cannot. FAULT: of the machine, the network or another rank; a
    restart may go on. STOPPED: asked to, with a checkpoint; --resume goes on.
    """

    DONE = 0
    MISTAKE = 2
    FAULT = 70
    STOPPED = 75


@dataclass(frozen=True)
class Status:
    """Content of RUN/status.json.

    checkpoint: the step that --resume would go on from; None where there is none. start: the name that ranks which were
    started together have in common.
    """

    state: Literal["running", "finished", "stopped", "failed"]
    step: int
    checkpoint: int | None
    message: str = ""
    restarts: int = 0
    host: str = ""
    process: int = 0
    start: str = ""
    time: str = ""  # UTC, when it was written

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        said = replace(self, host=socket.gethostname(), process=os.getpid(), time=now)
        write_text(folder / FILE, json.dumps(asdict(said), indent=2) + "\n")


def may_follow(there: Status | None, start: str) -> bool:
    """Return whether a running rank of `start` may overwrite this status.

    A rank that stood still and wakes knows neither that the run was started anew nor why the others have ended: the
    first cause stands.
    """
    return there is None or (there.start == start and there.state != "failed")


def read_status(folder: Path) -> Status | None:
    """Read the status; None where there is no such file, or one that is not of this kind."""
    try:
        return Status(**json.loads((folder / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
