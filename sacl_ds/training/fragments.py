"""Fragments of parameters and optimizer state that a rank owns, under ZeRO 0 to 3, for checkpoints.

DeepSpeed splits either the parameters laid end to end (stages 1 and 2) or each of them (stage 3). Said in places of the
parameter itself, row by row, both are ranges, which any other number of ranks at any stage can read its own from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from sacl_ds.ds_config import zero_stage
from sacl_ds.training.tensor_files import Entry, Fragments, fragment_name

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + count` of a parameter, which this rank owns. get, put: by kind, (count,) fp32."""

    name: str
    start: int
    count: int
    get: Callable[[str], Tensor]
    put: Callable[[str, Tensor], None]


def trained_parameters(engine: DeepSpeedEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def shapes(engine: DeepSpeedEngine) -> dict[str, tuple[int, ...]]:
    """Return the full shapes of all trained parameters."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained_parameters(engine)}


def optimizer_step(engine: DeepSpeedEngine) -> int:
    """Return how often the optimizer has stepped, by which it corrects its bias: skipped steps do not count."""
    inner = _inner(engine)
    counts = [int(state["step"]) for state in inner.state.values() if "step" in state]
    counts += [int(group["step"]) for group in inner.param_groups if "step" in group]
    return max(counts, default=0)


def entries(engine: DeepSpeedEngine) -> Iterator[Entry]:
    """Yield what this rank writes; every rank calls it. At stage 0, where all ranks hold all, only the first writes."""
    if zero_stage(engine.config) == 0 and engine.global_rank:
        return
    kinds = (WEIGHT, *MOMENTS) if optimizer_step(engine) else (WEIGHT,)
    for fragment in _owned(engine):
        for kind in kinds:
            name = fragment_name(kind, fragment.name, fragment.start)
            yield Entry(name, torch.float32, (fragment.count,), _reader(fragment, kind))


def fill(engine: DeepSpeedEngine, saved: Fragments, step: int) -> None:
    """Load what was saved into the engine; every rank calls it. step: what `optimizer_step` was.

    Raises UserError where something is missing.
    """
    stage = zero_stage(engine.config)
    if step:
        _make_states(engine)
    for fragment in _owned(engine):
        for kind in (WEIGHT, *MOMENTS) if step else (WEIGHT,):
            fragment.put(kind, saved.read(kind, fragment.name, fragment.start, fragment.count))
    inner = _inner(engine)
    for state in inner.state.values():
        if isinstance(count := state.get("step"), Tensor):
            state["step"] = torch.full_like(count, step)
        elif count is not None:
            state["step"] = step
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = step
    zero: Any = engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        # parameters that are kept whole go, and come again, from what was put, at their first use. Not before:
        # DeepSpeed (0.19.8) learns which modules read parameters of others by these not being there in the first pass
        zero.checkpoint_event_prologue()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)


def _inner(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    optimizer: Any = engine.optimizer
    return optimizer.optimizer if zero_stage(engine.config) else optimizer


def _owned(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    stage = zero_stage(engine.config)
    of = {0: _whole, 1: _of_flat, 2: _of_flat, 3: _of_sharded}[stage]
    for name, parameter in trained_parameters(engine):
        fragment = of(engine, name, parameter)
        if fragment is not None and fragment.count:
            yield fragment


def _whole(engine: DeepSpeedEngine, name: str, parameter: nn.Parameter) -> Fragment:
    def tensor(kind: str) -> Tensor:
        return parameter.detach() if kind == WEIGHT else _inner(engine).state[parameter][kind]

    def put(kind: str, value: Tensor) -> None:
        tensor(kind).view(-1).copy_(value)

    return Fragment(name, 0, parameter.numel(), lambda kind: tensor(kind).reshape(-1), put)


def _of_flat(engine: DeepSpeedEngine, name: str, parameter: nn.Parameter) -> Fragment | None:
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None  # of other ranks

    zero: Any = engine.optimizer
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    here, place = mapping.hp_fragment_address, mapping.lp_fragment_address

    def tensor(kind: str) -> Tensor:
        # the mapping's own fragments of moments are of the first parameter group alone (0.19.8)
        values = flat if kind == WEIGHT else zero.optimizer.state[flat][kind]
        return values.detach().narrow(0, here.start, here.numel)

    def put(kind: str, value: Tensor) -> None:
        tensor(kind).copy_(value)

    return Fragment(name, place.start, place.numel, tensor, put)


def _of_sharded(engine: DeepSpeedEngine, name: str, parameter: Any) -> Fragment:
    size = parameter.ds_tensor.numel()
    start = min(engine.global_rank * size, parameter.ds_numel)
    count = min(size, parameter.ds_numel - start)  # the last shards may hold padding, or nothing else

    def shard(kind: str) -> Tensor:
        if kind == WEIGHT:
            return safe_get_local_fp32_param(parameter)
        return safe_get_local_optimizer_state(parameter, kind)

    def put(kind: str, value: Tensor) -> None:
        padded = shard(kind).detach().clone()
        padded[:count] = value
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    return Fragment(name, start, count, lambda kind: shard(kind)[:count], put)


def _reader(fragment: Fragment, kind: str) -> Callable[[], Tensor]:
    return lambda: fragment.get(kind).float()


def _make_states(engine: DeepSpeedEngine) -> None:
    """Make the optimizer create its state, whichever it is: by a step with no gradient and no rate."""
    inner = _inner(engine)
    if inner.state:
        return
    groups = inner.param_groups
    rates, members = [group["lr"] for group in groups], [group["params"] for group in groups]
    zero: Any = engine.optimizer
    for number, group in enumerate(groups):
        group["lr"] = 0.0
        if zero_stage(engine.config) == 3:  # which lends the optimizer one sub-group at a time
            flat = enumerate(zero.fp32_partitioned_groups_flat)
            group["params"] = [p for sub, p in flat if zero.sub_group_to_group_id[sub] == number]
    without = [p for group in groups for p in group["params"] if p.grad is None]
    for parameter in without:
        parameter.grad = torch.zeros_like(parameter)
    inner.step()
    for parameter in without:
        parameter.grad = None
    for group, rate, before in zip(groups, rates, members, strict=True):
        group["lr"], group["params"] = rate, before
