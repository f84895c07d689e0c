"""Micro-batches give the gradients, losses and random draws of one pass over the whole global batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import on_ranks
from test_gradient_contract import LOSSES, PAIRS, assert_contract, targets, whole_batch_gradient

from sacl_ds.data.batch import Batch
from sacl_ds.machine import this_machine
from sacl_ds.training.accumulation import Beside, contrastive_step
from sacl_ds.training.objectives import Targets
from sacl_ds.training.step import Step

ROWS = 2  # of a micro-batch: each pair has one possible hard negative, so that ITM has nothing to draw


@dataclass(frozen=True)
class Known:
    """A teacher whose features are known by key."""

    image: dict[str, torch.Tensor]
    text: dict[str, torch.Tensor]

    def beside(self, batch: Batch, features: bool, tokens: bool) -> Beside:
        if not features:
            return Beside()
        image, text = (torch.stack([side[key] for key in batch.keys]).float() for side in (self.image, self.text))
        return Beside((image, text))

    def targets(self, beside: Beside) -> Targets:
        assert beside.teacher is not None
        return targets(beside.teacher, torch.float32)


def step_of(rows: int = ROWS, coalesce: bool = False) -> Step:
    generator = torch.Generator().manual_seed(3)
    return Step(0, 17, generator, torch.device("cpu"), rows, coalesce)


def engine_of(loss: str, stage: int, world: int, **more: Any) -> Any:
    from sacl_ds.ds_config import resolve
    from sacl_ds.training.engine import build_engine

    run = tiny.config(**LOSSES[loss], **more)
    train = {"global_batch_size": PAIRS, "micro_batch_size": ROWS}
    run = run.model_copy(update={"train": run.train.model_copy(update=train)})
    settings = resolve({"zero_optimization": {"stage": stage}}, run, world, this_machine("cpu"))
    return build_engine(tiny.objective(run), settings, run.optim)


def accumulating(rank: int, world: int, folder: Path) -> None:
    """float32 through DeepSpeed, ZeRO 0 to 3, reduced at every micro-batch or once."""
    from deepspeed.utils import safe_get_full_grad

    from sacl_ds.training.engine import start_process

    start_process()
    torch.set_num_threads(1)
    whole, teacher = tiny.batch(PAIRS)
    known = Known(*(dict(zip(whole.keys, side, strict=True)) for side in teacher))
    block = PAIRS // world
    mine, _ = tiny.rows(whole, teacher, rank * block, (rank + 1) * block)
    for loss in LOSSES:
        for stage in range(4):
            for coalesce in (False, True):
                if coalesce and (stage == 0 or loss != "sacl"):
                    continue
                engine = engine_of(loss, stage, world)
                for turn in range(2):  # the second without an update in between: nothing is left of the first
                    met = contrastive_step(engine, mine, step_of(coalesce=coalesce), known)
                    got = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
                    if turn == 0:
                        for group in engine.optimizer.param_groups:
                            group["lr"] = 0.0
                        engine.step()
                if rank == 0:
                    zeros = {name: torch.zeros_like(p) for name, p in tiny.objective(tiny.config(**LOSSES[loss])).named_parameters()}
                    grads = {name: zeros[name] if g is None else g.cpu() for name, g in got.items()}
                    torch.save({"gradient": grads, "losses": met.losses}, folder / f"{loss}{stage}{coalesce}.pt")
                engine.destroy()


@pytest.mark.parametrize("world", [1, 2])
def test_gradients(world: int, tmp_path: Path) -> None:
    on_ranks(world, accumulating, world, tmp_path)
    for loss in LOSSES:
        expected = whole_batch_gradient(loss, PAIRS // ROWS)
        for file in tmp_path.glob(f"{loss}[0-3]*.pt"):
            got = torch.load(file, weights_only=True)
            assert_contract(got["gradient"], expected, 1e-4)
