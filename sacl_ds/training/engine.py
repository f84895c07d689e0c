"""Processes, devices and the DeepSpeed engine. Only the package `training` knows DeepSpeed."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import CUDAMismatchException
from deepspeed.runtime import compiler
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.distributed import DistNetworkError

from sacl_ds.config import OptimConfig, TrainingConfig
from sacl_ds.distributed import barrier, broadcast_object, rank, world_size
from sacl_ds.ds_config import EngineConfig
from sacl_ds.errors import UserError
from sacl_ds.faults.guard import Ranks
from sacl_ds.machine import Machine, this_machine


def use_fused_layer_norm(module: nn.Module) -> int:
    """Replace every nn.LayerNorm inside `module` by apex's; returns how many. Needs NVIDIA's apex."""
    from apex.normalization import FusedLayerNorm

    exchanged = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm) and child.elementwise_affine and child.bias is not None:
                fused = FusedLayerNorm(child.normalized_shape, eps=child.eps)
                fused.weight, fused.bias = child.weight, child.bias
                setattr(parent, name, fused)
                exchanged += 1
    return exchanged


# every engine imports DeepSpeed's Muon, which compiles functions where they are defined: seconds of imports in each
# process, for an optimizer that no run uses
compiler.compile = lambda: lambda function: function
_OWN_NUMBER = "SACL_DS_LOCAL_RANK"
_GATHERED_AT_ONCE = 32_000_000  # parameters of ZeRO 3, 128 MB


def start_process() -> tuple[torch.device, Machine]:
    """Join the launcher's job (or be a job of one); returns this rank's device and what the machine can do."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # a script started by its interpreter's path lacks what activation adds: ninja, for what DeepSpeed compiles
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if "RANK" not in os.environ:
        from sacl_ds.launcher import take_place

        take_place()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    accelerator = get_accelerator()
    local_rank = _local_rank()
    if accelerator.device_name() == "cpu":
        # compiled at first use for a gain only in DeepSpeed's own all-reduce; gloo serves every collective
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(max(1, cores() // local_ranks()))
    else:
        local_rank = _device_number(local_rank, accelerator.device_count())
        accelerator.set_device(local_rank)
    try:
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    except DistNetworkError as error:
        port = os.environ["MASTER_PORT"]
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {port} is in use, by another run on this machine?; give this one its own: deepspeed --master_port "
            f"{int(port) + 1} ..."
        ) from None
    name = accelerator.device_name() if accelerator.device_name() == "cpu" else accelerator.device_name(local_rank)
    return torch.device(name), this_machine(accelerator.device_name())


def _local_rank() -> int:
    """Return this rank's number on its node."""
    return int(os.environ.get(_OWN_NUMBER) or os.environ.get("LOCAL_RANK", "0"))


def _device_number(local_rank: int, devices: int) -> int:
    """Return the number of the only visible device (srun --gpus-per-task=1), or that of the rank on its node.

    DeepSpeed takes it from LOCAL_RANK, and wants the same of mpirun.
    """
    if devices == 1 and local_rank:
        os.environ |= {_OWN_NUMBER: str(local_rank), "LOCAL_RANK": "0"}
        os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
        return 0
    if local_rank >= devices:
        raise UserError(
            f"rank {os.environ['RANK']} is number {local_rank} on its node, which shows it {devices} devices; start as "
            "many ranks a node as there are devices, or give each task one of its own (srun --gpus-per-task=1)"
        )
    return local_rank


def local_ranks() -> int:
    """Return the number of the job's ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def ranks() -> Ranks:
    """Return this rank's place in its job, for the guard."""
    local = _local_rank()
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    return Ranks(rank(), world_size(), local, address, broadcast_object, barrier)


def cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Group parameters: image encoder and the rest, each with its learning rate; weight decay on matrices only.

    Order and membership depend on the module alone, so that a checkpoint's groups fit again.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            part = "image" if ".image_encoder." in f".{name}" else "text"
            # under ZeRO 3 a parameter is flat, and ds_shape is its own
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            groups.setdefault((part, dimensions > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.lr_image if part == "image" else optim.lr_text,
            "weight_decay": optim.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def prepare_model(model: Any, run: TrainingConfig, config: EngineConfig) -> None:
    """Apply the configured fused norms, activation checkpointing and compilation, before the engine takes the model.

    model: a SaclModel or a task's model, with `checkpoint_activations` and `compile_layers`; changed in place.
    """
    if config.fused_norm:
        use_fused_layer_norm(model)
    if run.train.checkpoint_activations:
        model.checkpoint_activations()
    if run.kernels.compile:
        model.compile_layers()


def build_engine(module: nn.Module, config: EngineConfig, optim: OptimConfig) -> DeepSpeedEngine:
    """Raises UserError where an operator that `config` relies on fails to build."""
    groups = parameter_groups(module, optim)
    values = dict(config.values)
    own: dict[str, Any] = {"model_parameters": groups}
    if config.adam == "apex":
        from apex.optimizers import FusedAdam

        del values["optimizer"]
        own["optimizer"] = FusedAdam(
            groups, lr=optim.lr_text, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
    try:
        engine, *_ = deepspeed.initialize(model=module, config=values, **own)
    except (RuntimeError, CUDAMismatchException) as error:
        if isinstance(error, RuntimeError) and "building extension" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"DeepSpeed's AdamW cannot be built here: {reason}; set optimizer.params.torch_adam to true in the "
            "DeepSpeed configuration"
        ) from error
    return engine


def set_learning_rates(engine: DeepSpeedEngine, optim: OptimConfig, factor: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = factor * (optim.lr_image if group["part"] == "image" else optim.lr_text)


def forget_order(engine: DeepSpeedEngine) -> None:
    """Discard ZeRO 3's recorded order of modules after a forward pass that later steps will not repeat.

    ZeRO 3 records the order in one pass and keeps for good what this tells of parameters that can be released: after a
    pass without backward all of them, which would then be gathered anew in every backward pass to come.
    """
    if engine.zero_optimization_stage() == 3:
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        if coordinator.is_record_trace():
            coordinator._invalidate_trace()


def whole_parameters(
    engine: DeepSpeedEngine, module: nn.Module, trained: bool | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and current value of every parameter of `module` (a part of the engine's), on every rank.

    trained: only those that are, or that are not. Every rank must go through all of them: under ZeRO 3 the shards are
    gathered, some at a time, and a value is good only until the next one is asked for.
    """
    named = [(name, p) for name, p in module.named_parameters() if trained in (None, p.requires_grad)]
    if engine.zero_optimization_stage() != 3:
        yield from ((name, parameter.detach()) for name, parameter in named)
        return
    gathered: Callable[[list[nn.Parameter]], AbstractContextManager[None]] = deepspeed.zero.GatheredParameters
    for some in _batched(named):
        with gathered([parameter for _, parameter in some]):
            yield from ((name, parameter.detach()) for name, parameter in some)


def _batched(named: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Batch parameters of ZeRO 3 that are gathered together: one collective for many small ones."""
    some: list[tuple[str, nn.Parameter]] = []
    numbers = 0
    for name, parameter in named:
        size: int = parameter.ds_numel  # type: ignore[attr-defined]
        if some and numbers + size > _GATHERED_AT_ONCE:
            yield some
            some, numbers = [], 0
        some.append((name, parameter))
        numbers += size
    if some:
        yield some


def fill_parameters(engine: DeepSpeedEngine, values: dict[str, Tensor]) -> None:
    """Write whole tensors into untrained parameters, by name in the engine's module; every rank calls it.

    Raises KeyError where the module has no such parameter.
    """
    named = dict(engine.module.named_parameters())
    for name, value in values.items():
        sharded = [named[name]] if engine.zero_optimization_stage() == 3 else []
        with torch.no_grad(), deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
            if not sharded or engine.global_rank == 0:
                named[name].copy_(value)


def consolidated_state_dict(engine: DeepSpeedEngine, module: nn.Module) -> dict[str, Tensor]:
    """Gather all weights of `module` (a part of the engine's) in fp32 on the CPU, on rank 0; elsewhere an empty dict.

    Every rank must call it: under ZeRO 3 the shards are gathered.
    """
    first = engine.global_rank == 0
    state: dict[str, Tensor] = {}
    for name, parameter in whole_parameters(engine, module):
        if first:
            state[name] = parameter.float().cpu().clone()
    persistent = set(module.state_dict())
    for name, buffer in module.named_buffers():
        if first and name in persistent:
            state[name] = buffer.detach().cpu().clone()
    return state
