"""Runs whose processes are killed, stopped and signalled while they train."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from deepspeed import DeepSpeedEngine
from starting import SMALL, begin

from sacl_ds.telemetry.records import read


@dataclass
class Going:
    """A run under way: its folder, the processes of its ranks, what they have said so far."""

    folder: Path
    processes: list[Any]
    out: Path
    err: Path

    @property
    def said(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def reach(self, step: int, seconds: float = 120) -> None:
        """Wait until that step is in its log."""
        self.wait(lambda: any(line["step"] >= step for line in read(self.folder / "metrics.jsonl")), seconds)

    def wait(self, condition: Callable[[], bool], seconds: float = 120) -> float:
        """How long it took."""
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < seconds, self.said[-3000:]
            time.sleep(0.05)
        return time.monotonic() - begun

    def ended(self, seconds: float = 60) -> list[int]:
        """Exit statuses of all ranks, once they have ended; below 0: by that signal."""
        self.wait(lambda: all(process.exitcode is not None for process in self.processes), seconds)
        return [process.exitcode for process in self.processes]

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid

    def loader(self, rank: int) -> psutil.Process:
        """Its one loader process, by the name that PyTorch gives it."""
        (found,) = [child for child in self.children(rank) if child.name().startswith("pt_data_worker")]
        return found

    def children(self, rank: int) -> list[psutil.Process]:
        return psutil.Process(self.pid(rank)).children(recursive=True)


def dying(at: int) -> None:
    """From here on this process gets kill -9 where an engine would make its step number `at`."""
    step = DeepSpeedEngine.step

    def last(engine: DeepSpeedEngine, *arguments: Any, **options: Any) -> Any:
        if engine.global_steps == at - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(engine, *arguments, **options)

    DeepSpeedEngine.step = last


@contextmanager
def going(
    folder: Path,
    *arguments: str,
    ranks: int = 2,
    stage: int = 2,
    settings: Sequence[str] = (*SMALL, "teacher.steps=0"),
    mounts: int | None = None,
) -> Iterator[Going]:
    """launch/pretrain.py, by default a small run without a teacher, on so many ranks; at the end none of them is left.

    mounts: a process whose file systems they see.
    """
    line = ["--ds_config", f"ds_configs/zero{stage}.json", f"output_dir={folder}", *settings, *arguments]
    with tempfile.TemporaryDirectory() as said:
        out, err = Path(said, "out"), Path(said, "err")
        out.touch()
        err.touch()
        processes = begin(["launch/pretrain.py", *line], ranks, out, err, mounts=mounts)
        run = Going(folder, processes, out, err)
        try:
            yield run
        finally:
            for process in processes:
                if process.exitcode is None:
                    os.kill(process.pid, 9)
                process.join()
