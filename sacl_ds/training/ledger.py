"""The samples of a run that could not be used: counted over all ranks, named, and too many of them an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sacl_ds.data.faults import Fault
from sacl_ds.distributed import gather_objects, sum_over_ranks
from sacl_ds.errors import SharedError

_AT_LEAST = 1000  # samples that the share is taken of, so that one bad one among the first few does not end a run
_LISTED = 100  # faults that one line of the log names
_SHOWN = 5  # that are shown on the terminal


@dataclass
class Settled:
    """What `Ledger.settle` found, equal on all ranks."""

    figures: dict[str, int]  # since the start of this process
    faults: list[dict[str, Any]]  # new ones: kind, shard, key, reason, count; the most frequent first
    notes: list[str]  # lines for the terminal


class Ledger:
    def __init__(self, global_batch_size: int, max_bad_share: float, device: torch.device) -> None:
        self._batch, self._share, self._device = global_batch_size, max_bad_share, device
        self._new: Counter[Fault] = Counter()
        self._totals = {"bad": 0, "filtered": 0}
        self._seen = 0
        self._shown: set[Fault] = set()
        self._first: Fault | None = None

    def add(self, faults: Iterable[Fault]) -> None:
        """Of one step on this rank."""
        self._new.update(faults)
        self._seen += self._batch

    def settle(self) -> Settled:
        """Put the ranks' counts together; every rank calls it. Raises SharedError, on all, where too many are bad."""
        kinds = list(self._totals)
        mine = [sum(count for fault, count in self._new.items() if fault.kind == kind) for kind in kinds]
        new = sum_over_ranks(torch.tensor(mine, device=self._device)).tolist()
        for kind, count in zip(kinds, new, strict=True):
            self._totals[kind] += count
        merged: Counter[Fault] = Counter()
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

    def _notes(self, bad: list[Fault]) -> list[str]:
        """A line for each fault that was not shown before, until there are too many."""
        if len(self._shown) > _SHOWN:
            return []
        new = [fault for fault in bad if fault not in self._shown]
        self._shown.update(new)
        notes = [f"another sample stands in for {fault}" for fault in new[:_SHOWN]]
        return [*notes, "more of these are in metrics.jsonl"] if len(self._shown) > _SHOWN else notes
