"""Parts that no loss reaches stay as they started, and are in checkpoints, also for other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import on_ranks

from sacl_ds.machine import this_machine
from sacl_ds.model.sacl import SaclModel
from sacl_ds.training import checkpoint
from sacl_ds.training.objective import PretrainObjective, Targets

PAIRS = 8
ITC_ONLY = {"contrastive": "infonce", "matching_weight": 0.0, "mlm_weight": 0.0}
IDENTITY = checkpoint.Identity("words", "data")
UNREACHED = ("fusion_encoder.", "matching_head.", "mlm_head.")


def engine_of(stage: int, world: int, seed: int) -> Any:
    from sacl_ds.ds_config import resolve
    from sacl_ds.training.engine import build_engine, start_process

    start_process()
    torch.set_num_threads(1)
    run = tiny.config(**ITC_ONLY)
    train, optim = {"global_batch_size": PAIRS}, {"weight_decay": 0.5}
    run = run.model_copy(
        update={"train": run.train.model_copy(update=train), "optim": run.optim.model_copy(update=optim)}
    )
    settings = resolve({"zero_optimization": {"stage": stage}}, run, world, this_machine("cpu"))
    return build_engine(tiny.objective(run, seed), settings, run.optim)


def training(rank: int, stage: int, folder: Path) -> None:
    from sacl_ds.training.engine import consolidated_state_dict

    engine = engine_of(stage, 1, seed=0)
    for step in range(2):
        engine.backward(engine(tiny.batch(PAIRS, seed=step)[0], Targets(None, 0.0, None))["loss"])
        engine.step()
    checkpoint.save(engine, folder, 2, IDENTITY)
    torch.save(consolidated_state_dict(engine, engine.module.model), folder / "trained.pt")


def resuming(rank: int, stage: int, world: int, folder: Path) -> None:
    from sacl_ds.training.engine import consolidated_state_dict

    engine = engine_of(stage, world, seed=7)  # other weights to begin with
    resumed = checkpoint.resume(engine, folder, IDENTITY)
    assert (resumed.state.step, resumed.notes) == (2, [])
    state = consolidated_state_dict(engine, engine.module.model)
    if rank == 0:
        torch.save(state, folder / f"resumed {world}.pt")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoints_hold_what_is_not_trained(stage: int, tmp_path: Path) -> None:
    on_ranks(1, training, stage, tmp_path)
    begun = tiny.objective(tiny.config(**ITC_ONLY)).model.state_dict()
    trained = torch.load(tmp_path / "trained.pt", weights_only=True)
    for name, value in trained.items():
        assert torch.equal(value, begun[name]) == name.startswith(UNREACHED) or not value.is_floating_point(), name
    for world in (1, 2):
        on_ranks(world, resuming, stage, world, tmp_path)
        resumed = torch.load(tmp_path / f"resumed {world}.pt", weights_only=True)
        assert resumed.keys() == trained.keys()
        for name, value in trained.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("matching", [0.0, 1.0])
@pytest.mark.parametrize("words", [0.0, 1.0])
def test_all_that_is_trained_has_a_gradient(matching: float, words: float) -> None:
    """And nothing else would have one."""
    run = tiny.config(contrastive="infonce", matching_weight=matching, mlm_weight=words)
    objective = PretrainObjective(SaclModel(run.model, tiny.VOCABULARY, pretrained=False), run.loss)
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    objective.requires_grad_(True)
    objective(tiny.batch(PAIRS)[0], Targets(None, 0.0, None))["loss"].backward()
    reached = {name for name, p in objective.named_parameters() if p.grad is not None}
    assert trained == reached
