"""Steps whose loss or gradient is NaN or infinite: left out, counted, their samples named; too many end the run."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sacl_ds.distributed import gather_objects, max_over_ranks, rank, same_error
from sacl_ds.ds_config import zero_stage
from sacl_ds.errors import FULL, UserError

FILE = "bad_steps.jsonl"
_WINDOW = 1000  # steps
_SHOWN = 3  # keys in a line for the terminal


def optimizer_step(engine: DeepSpeedEngine, loss: Tensor) -> bool:
    """The engine's step; whether it was made. Every rank calls it, and has the same answer.

    Under ZeRO, DeepSpeed finds the norm of all gradients and leaves out a step where that is not finite. Without, the
    loss is looked at here; an infinite gradient under fp16's loss scale is no fault.
    """
    if zero_stage(engine.config):
        engine.step()
        return not engine.optimizer.overflow
    bad = max_over_ranks((~torch.isfinite(loss.detach())).float())
    if bad.item():
        engine.optimizer.zero_grad()
        engine.zero_grad()
        engine.skipped_steps += 1
        return False
    engine.step()
    return True


class BadSteps:
    """The same on all ranks but for the file, which the first one writes."""

    def __init__(self, folder: Path, limit: int, resumed_at: int | None) -> None:
        """resumed_at: keep what the file holds up to this step; None: start anew."""
        self._file, self._limit = folder / FILE, limit
        self._steps: deque[int] = deque()
        self.count = 0
        if rank() == 0 and self._file.exists():
            kept = [line for line in read(self._file) if resumed_at is not None and line["step"] <= resumed_at]
            self._file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, done: int, losses: dict[str, Tensor], keys: Sequence[str], suspect: Tensor) -> str:
        """Every rank calls it. keys: of this rank's samples; suspect: (b,) bool, those that are not finite by
        themselves.

        Returns a line for the user. Raises UserError where these were too many.
        """
        self.count += 1
        self._steps.append(done)
        while self._steps[0] <= done - _WINDOW:
            self._steps.popleft()
        values = {name: value.item() for name, value in losses.items()}
        named = [key for key, is_suspect in zip(keys, suspect.tolist(), strict=True) if is_suspect]
        parts = gather_objects((values, list(keys), named))
        offending = [key for _, _, some in parts for key in some]
        whole = [key for _, some, _ in parts for key in some]
        if offending:
            said = f"samples whose own features are not finite: {_listed(offending)}"
        else:
            said = f"no sample alone has features that are not finite, among {_listed(whole)}"
        with same_error():
            if rank() == 0:
                self._write({"step": done, "loss": _plain(parts[0][0]), "offending": offending, "keys": whole})
            if len(self._steps) > self._limit:
                raise UserError(
                    f"{len(self._steps)} of the last {_WINDOW} steps had a loss or gradient that is not finite, more "
                    f"than train.max_bad_steps={self._limit}; step {done}: {said}; all are in {self._file}; lower the "
                    "learning rate, or leave these samples out, and go on with --resume"
                )
        return f"step {done} is left out, its loss or gradient is not finite; {said}; all are in {FILE}"

    def _write(self, line: dict[str, Any]) -> None:
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            reason = "the disk is full" if error.errno in FULL else error.strerror
            raise UserError(
                f"{self._file} cannot be written: {reason}; put that right, and go on with --resume"
            ) from None


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _plain(values: dict[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
