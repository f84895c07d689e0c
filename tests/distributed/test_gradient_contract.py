"""The gradient that reaches the optimizer equals that of one process with the whole batch, at any world and stage."""

from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from contract import LOSSES, PAIRS, assert_contract, block_of, targets, whole_batch_gradient
from ranks import on_ranks

from sacl_ds.machine import this_machine
from sacl_ds.training.objective import PretrainObjective

FLOAT64 = ("sacl", "infonce", "sacl, patches")


def build(loss: str, world: int) -> PretrainObjective:
    matching = 1.0 if PAIRS // world == 2 else 0.0
    return tiny.objective(tiny.config(matching_weight=matching, **LOSSES[loss]))


def plain_ranks(rank: int, world: int, folder: Path) -> None:
    """float64, no engine: gradients averaged over ranks, as an engine does."""
    whole, teacher = tiny.batch(PAIRS)
    block = PAIRS // world
    for loss in FLOAT64:
        objective = build(loss, world).double()
        objective(*block_of(whole, teacher, rank * block, block))["loss"].backward()
        for parameter in objective.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        if rank == 0:
            torch.save({name: p.grad for name, p in objective.named_parameters()}, folder / f"{loss}.pt")


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_float64_without_engine(world: int, tmp_path: Path) -> None:
    on_ranks(world, plain_ranks, world, tmp_path)
    for loss in FLOAT64:
        got = torch.load(tmp_path / f"{loss}.pt", weights_only=True)
        assert_contract(got, whole_batch_gradient(loss, world), 1e-9)


def engine_ranks(rank: int, world: int, folder: Path) -> None:
    """float32 through DeepSpeed, ZeRO 0 to 3, both losses."""
    from deepspeed.utils import safe_get_full_grad

    from sacl_ds.ds_config import resolve
    from sacl_ds.training.engine import build_engine, start_process

    start_process()
    torch.set_num_threads(1)
    whole, teacher = tiny.batch(PAIRS)
    block = PAIRS // world
    for loss, options in LOSSES.items():
        for stage in range(4):
            run = tiny.config(**options)
            run = run.model_copy(update={"train": run.train.model_copy(update={"global_batch_size": PAIRS})})
            settings = resolve({"zero_optimization": {"stage": stage}}, run, world, this_machine("cpu"))
            engine = build_engine(build(loss, world), settings, run.optim)
            part, part_teacher = tiny.rows(whole, teacher, rank * block, (rank + 1) * block)
            engine.backward(engine(part, targets(part_teacher, torch.float32))["loss"])
            got = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
            if rank == 0:
                zeros = {name: torch.zeros_like(p) for name, p in build(loss, world).named_parameters()}
                grads = {name: zeros[name] if g is None else g.cpu() for name, g in got.items()}
                torch.save(grads, folder / f"{loss}{stage}.pt")
            engine.step()
            engine.destroy()


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_float32_through_deepspeed(world: int, tmp_path: Path) -> None:
    on_ranks(world, engine_ranks, world, tmp_path)
    for loss in LOSSES:
        expected = whole_batch_gradient(loss, world)
        for stage in range(4):
            got = torch.load(tmp_path / f"{loss}{stage}.pt", weights_only=True)
            assert_contract(got, expected, 1e-4)
