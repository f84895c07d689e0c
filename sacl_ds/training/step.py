"""What a step of training is told, beside its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sacl_ds.data.draws import words


@dataclass(frozen=True)
class Step:
    """One step of this rank.

    number: how many are done. seed: of everything random in it. generator: seeded by it, on `device`. rows: of a
    micro-batch. coalesce: whether the gradients of several are reduced at once. logged: whether its figures are.
    """

    number: int
    seed: int
    generator: torch.Generator
    device: torch.device
    rows: int
    coalesce: bool = False
    logged: bool = False

    def seed_of(self, micro_batch: int) -> int:
        """Of what is random in a micro-batch: the same whenever it is passed through the model."""
        return words(1, self.seed, micro_batch)[0] >> 1
