"""What evaluation, the momentum model and model.safetensors get of sharded weights: all their digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from ranks import on_ranks

from sacl_ds.ds_config import resolve
from sacl_ds.machine import this_machine


def gathering(rank: int, stage: int, precision: str, folder: Path) -> None:
    from sacl_ds.training.engine import build_engine, consolidated_state_dict, start_process

    start_process()
    run = tiny.config()
    train = run.train.model_copy(update={"global_batch_size": 8, "precision": precision})
    run = run.model_copy(update={"train": train})
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # tiny as they are, they are cut up
    settings = resolve({"zero_optimization": zero}, run, 2, this_machine("cpu"))
    engine = build_engine(tiny.objective(run), settings, run.optim)
    engine(tiny.batch(4)[0], None)  # forward gathers in what autocast computes with
    state = consolidated_state_dict(engine, engine.module.model)
    if rank == 0:
        torch.save(state, folder / "state.pt")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_weights_are_gathered_in_float32(stage: int, precision: str, tmp_path: Path) -> None:
    on_ranks(2, gathering, stage, precision, tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    begun = tiny.objective(tiny.config()).model.state_dict()
    assert state.keys() == begun.keys()
    for name, value in begun.items():
        assert torch.equal(state[name], value), name
