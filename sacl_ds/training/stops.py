"""All ranks stop behind the same step, whichever of them was asked to."""

from __future__ import annotations

import torch

from sacl_ds.distributed import broadcast_object, max_over_ranks, world_size

_SECONDS = 1.0  # between looks


class Stops:
    """Ranks look together, about once a second: one number over the wire, and a wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._every = device, 1

    def pace(self, step_seconds: float) -> None:
        """At a logged step, on every rank: how long steps take by now."""
        self._every = broadcast_object(max(1, int(_SECONDS / max(step_seconds, 1e-3))))

    def agreed(self, done: int, asked: bool) -> bool:
        """Whether any rank was asked to stop; True on all ranks, or on none."""
        if world_size() == 1:
            return asked
        if done % self._every:
            return False
        return bool(max_over_ranks(torch.tensor(float(asked), device=self._device)).item())
