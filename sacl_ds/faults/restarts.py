"""Supervision of a rank: a parent process restarts it after a fault, from the run's newest checkpoint.

No rank asks another: where one fails, the heartbeat ends all, and each supervisor starts its own again; they meet in
the same attempt, on a port of its own, so that no rank takes the last attempt's process for one of this.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Literal

from sacl_ds.files import write_text

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


_ATTEMPT, _SUPERVISOR = "SACL_DS_ATTEMPT", "SACL_DS_SUPERVISOR"
_PAUSE = 3.0  # seconds, for the others to end too
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def attempt() -> int:
    """Return how often this rank was restarted."""
    return int(os.environ.get(_ATTEMPT, "0"))


def supervised() -> bool:
    return _SUPERVISOR in os.environ


def supervise(command: list[str], limit: int) -> int:
    """Run `command`, restarted up to `limit` times where that may help; returns its last exit status."""
    child: subprocess.Popen[bytes] | None = None
    asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    count = 0
    while True:
        child = subprocess.Popen(command, env=os.environ | _environment(count))
        if asked:  # meanwhile, when there was none to be told
            child.terminate()
        status = child.wait()
        if asked or status in (Exit.DONE, Exit.MISTAKE, Exit.STOPPED) or count >= limit:
            return status if status >= 0 else 128 - status
        count += 1
        if os.environ.get("RANK", "0") == "0":
            print(f"restart {count} of {limit} (train.max_restarts), from the newest checkpoint", flush=True)
        time.sleep(_PAUSE)
        if asked:
            return Exit.STOPPED


def holds_checkpoint(run_folder: Path) -> bool:
    """Return whether a restart has a checkpoint to go on from."""
    return any(run_folder.glob("**/checkpoints/step_*/manifest.json")) or (run_folder / "model.safetensors").exists()


def _environment(count: int) -> dict[str, str]:
    values = {_ATTEMPT: str(count), _SUPERVISOR: str(os.getpid())}
    if count and "MASTER_PORT" in os.environ:
        values["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + count)
        values["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's own listens on the first port alone
    return values


def die_with_supervisor() -> None:
    """Ask the system (Linux) for SIGTERM when the supervisor dies; the supervised process calls it at its start."""
    supervisor = os.environ.get(_SUPERVISOR)
    if supervisor is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)
    if os.getppid() != int(supervisor):
        os._exit(Exit.FAULT)
