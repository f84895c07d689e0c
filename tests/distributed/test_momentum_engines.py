"""The average of a model that DeepSpeed trains, at ZeRO 0 to 3, and its state beside a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from ranks import on_ranks

from sacl_ds.config import MomentumConfig, RunConfig
from sacl_ds.model.momentum import Momentum
from sacl_ds.training.step import FrozenModels, Step

PAIRS, STEPS, DECAY = 8, 6, 0.9


def run_of() -> RunConfig:
    """eps far above rounding: Adam would blow up the gradients that are nothing but rounding (of key biases)."""
    run = tiny.config(matching_weight=0.0, sharpness=5.0, teacher_sharpness=3.0)
    train = run.train.model_copy(update={"global_batch_size": PAIRS})
    momentum = MomentumConfig(enabled=True, decay=DECAY, queue_size=11)
    optim = run.optim.model_copy(update={"eps": 1e-4, "lr_image": 1e-2, "lr_text": 1e-2})
    return run.model_copy(update={"train": train, "momentum": momentum, "optim": optim})


def build(world: int, stage: int):
    """The engine of a fresh model, and its momentum."""
    from sacl_ds.ds_config import resolve
    from sacl_ds.machine import this_machine
    from sacl_ds.training.engine import build_engine, start_process

    start_process()
    torch.set_num_threads(1)
    run = run_of()
    objective = tiny.objective(run)
    momentum = Momentum(objective.model, run.momentum, teacher="some")
    settings = resolve({"zero_optimization": {"stage": stage}}, run, world, this_machine("cpu"))
    return build_engine(objective, settings, run.optim), momentum


def step_of(engine, momentum: Momentum, step: int, rank: int, world: int) -> None:
    """As `PretrainTask.step` does it."""
    from sacl_ds.training.engine import whole_parameters

    whole, teacher = tiny.batch(PAIRS, seed=step)
    ids = torch.randint(0, 60, (PAIRS, 2), generator=torch.Generator().manual_seed(step))
    block = PAIRS // world
    batch, teacher = tiny.rows(replace(whole, pair_ids=ids), teacher, rank * block, (rank + 1) * block)
    teacher = (teacher[0].float(), teacher[1].float())
    frozen = FrozenModels(momentum=momentum)
    features, token_logits = momentum.outputs(batch, True, "fp32")
    now = Step(step, 0, torch.Generator(), torch.device("cpu"), block, alpha=0.6, soft_weight=0.4)
    targets = frozen.targets(now, teacher, features, token_logits)
    engine.backward(engine(batch, targets)["loss"])
    engine.step()
    momentum.update(whole_parameters(engine, engine.module.model))
    momentum.push(targets.keys.image, targets.keys.text, batch.pair_ids, teacher)


def averaging_ranks(rank: int, world: int, folder: Path) -> None:
    """The averages of each stage, and the full parameters after each step as DeepSpeed itself hands them out."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for stage in range(4):
        engine, momentum = build(world, stage)
        trajectory = [{name: value.clone() for name, value in momentum.average.state_dict().items()}]
        for step in range(STEPS):
            step_of(engine, momentum, step, rank, world)
            full = {}
            for name, parameter in engine.module.model.named_parameters():
                if not parameter.requires_grad:  # ITM's head, which DeepSpeed has no optimizer's copy of
                    with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                        full[name] = parameter.detach().clone()
                    continue
                # at stage 0 there is nothing to ask: the parameter is whole
                value = parameter.detach() if stage == 0 else safe_get_full_fp32_param(parameter)
                full[name] = value.view(trajectory[0][name].shape).clone()
            trajectory.append(full)
        engine.destroy()
        torch.save({"trajectory": trajectory, "state": momentum.state()}, folder / f"{stage} {rank}.pt")


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_average_is_that_of_the_full_parameters(world: int, tmp_path: Path) -> None:
    """To the bit at every stage and on every rank; between stages, where Adam's rounding differs, to 1e-5."""
    on_ranks(world, averaging_ranks, world, tmp_path)
    start = tiny.objective(run_of()).model.state_dict()
    states = []
    for stage in range(4):
        found = [torch.load(tmp_path / f"{stage} {rank}.pt", weights_only=True) for rank in range(world)]
        state, trajectory = found[0]["state"], found[0]["trajectory"]
        for name, value in start.items():
            assert torch.equal(trajectory[0][name], value), f"stage {stage} starts with another {name}"
            average = value.clone()
            for full in trajectory[1:]:
                average = full[name] if name.startswith("logit_scale.") else DECAY * average + (1 - DECAY) * full[name]
            # the same numbers by another expression: rounded differently, at most in the last places
            torch.testing.assert_close(state[f"average.{name}"], average, rtol=1e-6, atol=1e-8)
            step_by_step = value.clone()
            for full in trajectory[1:]:
                step_by_step.mul_(DECAY).add_(full[name], alpha=1 - DECAY)
            if not name.startswith("logit_scale."):
                assert torch.equal(state[f"average.{name}"], step_by_step), f"stage {stage}: {name}"
        for other in found[1:]:
            for name, value in state.items():
                assert torch.equal(other["state"][name], value), f"stage {stage}: ranks differ in {name}"
        states.append(state)
    for state in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5)
    moved = max((states[3][f"average.{name}"] - value).abs().max() for name, value in start.items())
    assert moved > 0.01


def saving_ranks(rank: int, world: int, folder: Path, stage: int) -> None:
    from sacl_ds.training import checkpoint

    engine, momentum = build(world, stage)
    for step in range(3):
        step_of(engine, momentum, step, rank, world)
    checkpoint.save(engine, folder, 3, checkpoint.Identity("words", "data"), momentum)
    torch.save(momentum.state(), folder / f"saved {rank}.pt")
    engine.destroy()


def loading_ranks(rank: int, world: int, folder: Path, stage: int) -> None:
    from sacl_ds.training import checkpoint
    from sacl_ds.training.engine import whole_parameters

    engine, momentum = build(world, stage)
    for parameter in momentum.average.parameters():
        parameter.zero_()  # nothing of what is loaded may have been there before
    identity = checkpoint.Identity("words", "data")
    resumed = checkpoint.resume(engine, folder, identity, momentum, 2)
    assert (resumed.state.step, resumed.notes) == (3, [])
    torch.save(momentum.state(), folder / f"loaded {rank}.pt")
    step_of(engine, momentum, 3, rank, world)
    parameters = {name: value.clone() for name, value in whole_parameters(engine, engine.module.model)}
    torch.save({"state": momentum.state(), "parameters": parameters}, folder / f"stepped {world} {rank}.pt")
    engine.destroy()


@pytest.mark.parametrize(("saved_by", "loaded_by", "stage"), [(2, 1, 2), (1, 2, 3)])
def test_another_number_of_ranks_goes_on(saved_by: int, loaded_by: int, stage: int, tmp_path: Path) -> None:
    """Averages and queue to the bit; the next step as with the old number, to rounding."""
    on_ranks(saved_by, saving_ranks, saved_by, tmp_path, stage)
    saved = torch.load(tmp_path / "saved 0.pt", weights_only=True)
    assert saved["queue.image"].shape == (11, 16)
    on_ranks(loaded_by, loading_ranks, loaded_by, tmp_path, stage)
    on_ranks(saved_by, loading_ranks, saved_by, tmp_path, stage)
    for rank in range(loaded_by):
        loaded = torch.load(tmp_path / f"loaded {rank}.pt", weights_only=True)
        assert loaded.keys() == saved.keys()
        for name, value in saved.items():
            assert torch.equal(loaded[name], value), name
    ends = [torch.load(tmp_path / f"stepped {world} 0.pt", weights_only=True) for world in (saved_by, loaded_by)]
    for room in ("state", "parameters"):
        for name, value in ends[0][room].items():
            torch.testing.assert_close(ends[1][room][name], value, rtol=0, atol=1e-5)
