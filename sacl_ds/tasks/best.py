"""Best weights of a run, kept as its model.safetensors, and their metric."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sacl_ds.atomic import write_text
from sacl_ds.checksums import require_unchanged
from sacl_ds.distributed import barrier, rank
from sacl_ds.errors import UserError
from sacl_ds.model.saved import WEIGHTS, save_weights
from sacl_ds.training.task import Figures

FILE = "best.json"


class Best:
    """Keeper of the best weights. Its state is the same on all ranks, since the metrics are."""

    def __init__(self, folder: Path, main: str, resumed_at: int | None) -> None:
        """Begin anew, or go on from the folder's best.

        resumed_at: steps done by the resumed run; a later best is not taken over, since it will come again. Raises
        UserError where best.json cannot be read.
        """
        self.folder, self.main = folder, main
        self.step, self.value = 0, -math.inf
        file = folder / FILE
        if resumed_at is None or not file.exists():
            return
        require_unchanged(folder, f"--resume: {folder}", FILE)
        try:
            kept = json.loads(file.read_text())
            step, value, figure = int(kept["step"]), float(kept["value"]), str(kept["figure"])
            if not math.isfinite(value):
                raise ValueError(f"its value is {value}")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"--resume: {file} cannot be read: {error}; remove it, and the next best is kept") from None
        if step <= resumed_at and figure == main and (folder / WEIGHTS).exists():
            self.step, self.value = step, value

    def offer(self, step: int, figures: Figures, state: Callable[[], dict[str, Tensor]]) -> bool:
        """Keep the weights if `figures` are the best so far; every rank calls it. Returns whether they are.

        state: collective, whole on rank 0.
        """
        value = figures[self.main][0]
        if not value > self.value and self.step:
            return False
        self.step, self.value = step, value
        weights = state()
        if rank() == 0:
            save_weights(weights, self.folder, step)
            said = {name: figure[0] for name, figure in figures.items()}
            kept = {"step": step, "figure": self.main, "value": value, "figures": said}
            write_text(self.folder / FILE, json.dumps(kept, indent=2))
        barrier()
        return True
