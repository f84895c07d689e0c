"""The gradient that reaches the optimizer equals that of one process with the whole batch, at any world and stage."""

from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import on_ranks

from sacl_ds.machine import this_machine
from sacl_ds.training.objectives import PretrainObjective, Targets

PAIRS = 8
LOSSES = {
    "sacl": {"contrastive": "sacl", "sharpness": 5.0},
    "infonce": {"contrastive": "infonce"},
    "sacl, triton": {"contrastive": "sacl", "sharpness": 5.0, "backend": "triton"},
    "sacl, patches": {
        "selection": {"placement": "tower", "layers": [1, 2], "keep_rate": 0.5},
        "contrastive": "sacl",
        "sharpness": 5.0,
    },
}
FLOAT64 = ("sacl", "infonce", "sacl, patches")


def targets(teacher, dtype: torch.dtype = torch.float64) -> Targets:
    return Targets((teacher[0].to(dtype), teacher[1].to(dtype)), 0.6, None)


def whole_batch_gradient(loss: str, world: int) -> dict[str, torch.Tensor]:
    """One process, float64: ITC (dense) and MLM over the whole batch; ITM, whose negatives are a rank's own, block by
    block."""
    options = LOSSES[loss] | {"backend": "reference"}
    whole, teacher = tiny.batch(PAIRS)
    block = PAIRS // world
    joint = tiny.objective(tiny.config(matching_weight=0.0, **options)).double()
    joint(whole, targets(teacher))["loss"].backward()
    gradient = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in joint.named_parameters()}
    if block == 2:  # two pairs: each has exactly one possible negative, so that ITM has nothing to draw
        settings = {"contrastive_weight": 0.0, "mlm_weight": 0.0, **options}
        for start in range(0, PAIRS, block):
            alone = tiny.objective(tiny.config(**settings)).double()
            alone(*_block(whole, teacher, start, block))["itm"].backward()
            for name, p in alone.named_parameters():
                if p.grad is not None:
                    gradient[name] = gradient[name] + p.grad / world
    return gradient


def _block(whole, teacher, start: int, block: int):
    part, part_teacher = tiny.rows(whole, teacher, start, start + block)
    return part, targets(part_teacher)


def build(loss: str, world: int) -> PretrainObjective:
    matching = 1.0 if PAIRS // world == 2 else 0.0
    return tiny.objective(tiny.config(matching_weight=matching, **LOSSES[loss]))


def plain_ranks(rank: int, world: int, folder: Path) -> None:
    """float64, no engine: gradients averaged over ranks, as an engine does."""
    whole, teacher = tiny.batch(PAIRS)
    block = PAIRS // world
    for loss in FLOAT64:
        objective = build(loss, world).double()
        objective(*_block(whole, teacher, rank * block, block))["loss"].backward()
        for parameter in objective.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        if rank == 0:
            torch.save({name: p.grad for name, p in objective.named_parameters()}, folder / f"{loss}.pt")


def assert_contract(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    total = torch.stack([g.double().norm() for g in expected.values()]).norm()
    assert total > 0
    for name, gradient in expected.items():
        base = max(gradient.double().norm(), 1e-4 * total)
        error = (got[name].double() - gradient.double()).norm() / base
        assert error < tolerance, f"{name}: {error:.2e}"
    for part in ("image_encoder", "text_encoder", "image_projection", "text_projection", "logit_scale"):
        norm = sum(g.norm() for name, g in expected.items() if part in name)
        assert norm > 0, f"{part} has no gradient at all"


@pytest.mark.parametrize("world", [1, 2, 4])
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


@pytest.mark.parametrize("world", [1, 2, 4])
def test_float32_through_deepspeed(world: int, tmp_path: Path) -> None:
    on_ranks(world, engine_ranks, world, tmp_path)
    for loss in LOSSES:
        expected = whole_batch_gradient(loss, world)
        for stage in range(4):
            got = torch.load(tmp_path / f"{loss}{stage}.pt", weights_only=True)
            assert_contract(got, expected, 1e-4)
