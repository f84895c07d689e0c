"""An engine of any ZeRO stage, and steps of it that are the same on any number of ranks."""

from __future__ import annotations

from typing import Any

import tiny
import torch

from sacl_ds.machine import this_machine
from sacl_ds.training import checkpoint
from sacl_ds.training.objective import Targets

PAIRS, STEPS = 12, 3


IDENTITY = checkpoint.Identity("words", "data")


Stage = int | str  # of ZeRO, or which file of ds_configs


def engine_of(stage: Stage, world: int, seed: int) -> Any:
    from sacl_ds.ds_config import read_ds_config, resolve
    from sacl_ds.training.engine import build_engine, start_process

    start_process()
    torch.set_num_threads(1)
    run = tiny.config(contrastive="infonce", mlm_weight=0.0)
    optim = {"weight_decay": 0.5, "lr_image": 0.02, "lr_text": 0.01, "clip_norm": 0.5}
    run = run.model_copy(
        update={
            "train": run.train.model_copy(update={"global_batch_size": PAIRS}),
            "optim": run.optim.model_copy(update=optim),
            "loss": run.loss.model_copy(update={"matching_weight": 0.0}),
        }
    )
    plain = {"zero_optimization": {"stage": stage}}
    ds = plain if stage in (0, 1, 2, 3) else read_ds_config(f"ds_configs/zero{stage}.json")
    objective = tiny.objective(run, seed)
    return build_engine(objective, resolve(ds, run, world, this_machine("cpu")), run.optim)


def steps(engine: Any, rank: int, world: int, numbers: range) -> list[float]:
    """Losses of the whole batch, the same on all ranks."""
    found = []
    for step in numbers:
        share = PAIRS // world
        whole, teacher = tiny.batch(PAIRS, seed=step)
        mine, _ = tiny.rows(whole, teacher, rank * share, (rank + 1) * share)
        loss = engine(mine, Targets(None, 0.0, None))["loss"]
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        found.append(mean.item() / world)
    return found


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    from sacl_ds.training.engine import consolidated_state_dict

    return consolidated_state_dict(engine, engine.module.model)
