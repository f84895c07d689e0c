"""Health of a run: steps that are not finite, unusable samples, requests to stop, signs of a sharpness too large.

Cautions about the regulation concern the student's own term of the similarity, (1 - alpha) e^(kappa c), in which the
model judges itself. A frozen teacher's term has no such feedback. At equal cosines near 1 the student's term is the
share sigmoid(log((1 - alpha) / alpha) + kappa - kappa_t) of the whole; under a tenth, nothing is said.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sacl_ds.config import RunConfig
from sacl_ds.data.sample import SampleFault
from sacl_ds.distributed import (
    broadcast_object,
    gather_objects,
    max_over_ranks,
    raise_on_all_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from sacl_ds.errors import FULL, SharedError, UserError

BAD_STEPS = "bad_steps.jsonl"
_WINDOW = 1000  # steps
_KEYS_SHOWN = 3  # keys in a line for the terminal


def optimizer_step(engine: DeepSpeedEngine, loss: Tensor) -> bool:
    """Take the engine's step; returns whether it was made, the same on every rank. Every rank calls it.

    Under ZeRO, DeepSpeed finds the norm of all gradients and leaves out a step where that is not finite. Without, the
    loss is looked at here; an infinite gradient under fp16's loss scale is no fault.
    """
    if engine.zero_optimization_stage():
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
    """Log of steps with loss or gradient that is not finite, and the limit on them.

    Equal on all ranks; the first one writes the file.
    """

    def __init__(self, folder: Path, limit: int, resumed_at: int | None) -> None:
        """Open the log. resumed_at: keep what the file holds up to this step; None: start anew."""
        self._file, self._limit = folder / BAD_STEPS, limit
        self._steps: deque[int] = deque()
        self.count = 0
        if rank() == 0 and self._file.exists():
            kept = [
                line for line in read_bad_steps(self._file) if resumed_at is not None and line["step"] <= resumed_at
            ]
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
        with raise_on_all_ranks():
            if rank() == 0:
                self._write({"step": done, "loss": _plain(parts[0][0]), "offending": offending, "keys": whole})
            if len(self._steps) > self._limit:
                raise UserError(
                    f"{len(self._steps)} of the last {_WINDOW} steps had a loss or gradient that is not finite, more "
                    f"than train.max_bad_steps={self._limit}; step {done}: {said}; all are in {self._file}; lower the "
                    "learning rate, or leave these samples out, and go on with --resume"
                )
        return f"step {done} is left out, its loss or gradient is not finite; {said}; all are in {BAD_STEPS}"

    def _write(self, line: dict[str, Any]) -> None:
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            reason = "the disk is full" if error.errno in FULL else error.strerror
            raise UserError(
                f"{self._file} cannot be written: {reason}; put that right, and go on with --resume"
            ) from None


def read_bad_steps(path: Path) -> list[dict[str, Any]]:
    """Read all complete lines."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
    return ", ".join(keys[:_KEYS_SHOWN]) + more


def _plain(values: dict[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


_AT_LEAST = 1000  # samples that the share is taken of, so that one bad one among the first few does not end a run
_LISTED = 100  # faults that one line of the log names
_SHOWN = 5  # that are shown on the terminal


@dataclass
class Settled:
    """Result of `Ledger.settle`, equal on all ranks."""

    figures: dict[str, int]  # since the start of this process
    faults: list[dict[str, Any]]  # new ones: kind, shard, key, reason, count; the most frequent first
    notes: list[str]  # lines for the terminal


class Ledger:
    def __init__(self, global_batch_size: int, max_bad_share: float, device: torch.device) -> None:
        self._batch, self._share, self._device = global_batch_size, max_bad_share, device
        self._new: Counter[SampleFault] = Counter()
        self._totals = {"bad": 0, "filtered": 0}
        self._seen = 0
        self._shown: set[SampleFault] = set()
        self._first: SampleFault | None = None

    def add(self, faults: Iterable[SampleFault]) -> None:
        """Record the faults of one step on this rank."""
        self._new.update(faults)
        self._seen += self._batch

    def settle(self) -> Settled:
        """Add up the ranks' counts; every rank calls it. Raises SharedError, on all, where too many are bad."""
        kinds = list(self._totals)
        mine = [sum(count for fault, count in self._new.items() if fault.kind == kind) for kind in kinds]
        new = sum_over_ranks(torch.tensor(mine, device=self._device)).tolist()
        for kind, count in zip(kinds, new, strict=True):
            self._totals[kind] += count
        merged: Counter[SampleFault] = Counter()
        if any(new):
            for part in gather_objects(self._new):
                merged.update(part)
        self._new = Counter()
        bad = [fault for fault in merged if fault.kind == "bad"]
        self._first = self._first or (bad[0] if bad else None)
        if self._totals["bad"] > self._share * max(self._seen, _AT_LEAST if self._share else 0):
            raise SharedError(
                f"{self._totals['bad']} of {self._seen} samples cannot be used, more than "
                f"data.max_bad_share={self._share:g}; the first: {self._first}; tools/inspect_shards.py lists them"
            )
        listed = [
            {"kind": fault.kind, "shard": fault.shard, "key": fault.key, "reason": fault.reason, "count": count}
            for fault, count in merged.most_common(_LISTED)
        ]
        return Settled({f"{kind}_samples": total for kind, total in self._totals.items()}, listed, self._notes(bad))

    def _notes(self, bad: list[SampleFault]) -> list[str]:
        """List a line for each fault that was not shown before, until there are too many."""
        if len(self._shown) > _SHOWN:
            return []
        new = [fault for fault in bad if fault not in self._shown]
        self._shown.update(new)
        notes = [f"another sample stands in for {fault}" for fault in new[:_SHOWN]]
        return [*notes, "more of these are in metrics.jsonl"] if len(self._shown) > _SHOWN else notes


_SECONDS_BETWEEN_LOOKS = 1.0


class Stops:
    """Agreement of ranks on requests to stop, about once a second: one number over the wire, and a device sync."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._every = device, 1

    def pace(self, step_seconds: float) -> None:
        """Set how often ranks look for requests to stop, by the seconds a step takes; a collective, called when
        logging."""
        self._every = broadcast_object(max(1, int(_SECONDS_BETWEEN_LOOKS / max(step_seconds, 1e-3))))

    def agreed(self, done: int, asked: bool) -> bool:
        """Return whether any rank was asked to stop; True on all ranks, or on none."""
        if world_size() == 1:
            return asked
        if done % self._every:
            return False
        return bool(max_over_ranks(torch.tensor(float(asked), device=self._device)).item())


LEAST_SHARE = 0.2
"""Effective share of the negatives under which their weights are those of too large a sharpness.

Scenes, measured at the end of runs: near the best sharpness 0.29; at 12 without teacher, collapsed (the push had turned
round: mass -7.8 nats at logit scale 18), 0.16; at 20 with teacher, past its best, 0.13. For cosines that spread
normally with deviation d it is e^-(kappa d)^2, so 0.2 is kappa d = 1.27: an anchor's weights differ by a factor of
3.6 within one deviation. Mass and shape do not tell the cases apart: shape is 1.5 nats collapsed, 3.1 past the best.
"""

_LEAST_OF_STUDENT = 0.1


class Cautions:
    """Warnings about the metrics, the same on all ranks since the metrics are. Each method returns a line, or None."""

    def __init__(self, run: RunConfig) -> None:
        loss, optim, steps = run.loss, run.optim, run.train.steps
        self._regulated = loss.contrastive == "sacl" and loss.sharpness > 0
        self._sharpness = loss.sharpness
        self._of_teacher = loss.sharpness if loss.teacher_sharpness is None else loss.teacher_sharpness
        # an untrained model's cosines are random or lie in a narrow cone: its weights say nothing of what they become
        self._settled_after = max(steps // 10, min(optim.warmup_steps, steps // 2))
        self._said: set[str] = set()

    def of_scale(self, done: int, alpha: float, logit_scale: float) -> str | None:
        """Warn, after `done` steps, where the sharpness passes half of the logit scale.

        The push on a negative goes as e^((logit_scale - kappa) c): at half, it rises half as fast with similarity as
        InfoNCE's, beyond the scale it falls. The scale is learned and rises at first, so that half of it counts after
        the start only.
        """
        limit = logit_scale / 2 if done > self._settled_after else logit_scale
        if self._sharpness <= limit or not self._judges(alpha):
            return None
        return self._once(
            "scale",
            f"loss.sharpness={self._sharpness:g} is over half of the logit scale ({logit_scale:.1f} at step {done}): "
            "the push on a negative goes as exp((logit scale - sharpness) * cosine) and inverts beyond the scale; take "
            f"loss.sharpness={logit_scale / 2:.2g} or less, or leave more to a teacher (loss.alpha_end)",
        )

    def of_weights(self, done: int, alpha: float, figures: Sequence[Mapping[str, Any]]) -> str | None:
        """Warn, after `done` steps, where the weights recorded then look like the collapse at too large a sharpness.

        figures: rows of both directions; see LEAST_SHARE.
        """
        share = sum(row["effective_share"] for row in figures) / len(figures)
        if done <= self._settled_after or not share < LEAST_SHARE or not self._judges(alpha):
            return None
        mass = sum(row["mass"] for row in figures) / len(figures)
        return self._once(
            "weights",
            f"weights as of too large a sharpness: at step {done} the effective number of negatives is {share:.0%} of "
            f"all, mass {mass:.1f} nats (under {LEAST_SHARE:.0%} models were past their best, or collapsed); take a "
            f"lower loss.sharpness (now {self._sharpness:g}), or leave more to a teacher (loss.alpha_end)",
        )

    def _judges(self, alpha: float) -> bool:
        """Return whether the student's term counts."""
        if not self._regulated or alpha >= 1:
            return False
        if alpha <= 0:
            return True
        odds = math.log1p(-alpha) - math.log(alpha) + self._sharpness - self._of_teacher
        return odds >= math.log(_LEAST_OF_STUDENT / (1 - _LEAST_OF_STUDENT))

    def _once(self, kind: str, line: str) -> str | None:
        if kind in self._said:
            return None
        self._said.add(kind)
        return line
