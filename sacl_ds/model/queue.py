"""A ring of earlier pairs, the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor


class Queue:
    """The last `size` pairs that were pushed: rows of named columns, first in, first out.

    It starts empty and grows; once full, what comes takes the place of the oldest. Nothing is drawn to fill it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.filled = 0  # rows that hold a pair: the first ones
        self._next = 0  # the row that is written next
        self._columns: dict[str, Tensor] = {}

    def push(self, rows: dict[str, Tensor]) -> None:
        """rows: (n, ...) a column, the same columns every time; n may be anything, also more than fit."""
        count = len(next(iter(rows.values())))
        if self.size == 0 or count == 0:
            return
        if not self._columns:
            self._columns = {name: row.new_zeros(self.size, *row.shape[1:]) for name, row in rows.items()}
        if rows.keys() != self._columns.keys():
            raise ValueError(f"the queue holds {', '.join(self._columns)}, not {', '.join(rows)}")
        kept = min(count, self.size)
        device = next(iter(rows.values())).device
        places = (self._next + count - kept + torch.arange(kept, device=device)) % self.size
        for name, row in rows.items():
            self._columns[name][places] = row[count - kept :].detach().to(self._columns[name].dtype)
        self._next = (self._next + count) % self.size
        self.filled = min(self.size, self.filled + count)

    def __getitem__(self, name: str) -> Tensor | None:
        """(filled, ...) rows of a column, not in the order of their age; None while there are none."""
        return self._columns[name][: self.filled] if self.filled and name in self._columns else None

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs: what is filled, a column each, and `next`."""
        state = {name: column[: self.filled] for name, column in self._columns.items()}
        return state | {"next": torch.tensor(self._next)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """From the state of a queue of the same size."""
        columns = {name: column for name, column in state.items() if name != "next"}
        self._next = int(state["next"])
        self.filled = len(next(iter(columns.values()))) if columns else 0
        self._columns = {}
        for name, column in columns.items():
            self._columns[name] = column.new_zeros(self.size, *column.shape[1:])
            self._columns[name][: self.filled] = column
