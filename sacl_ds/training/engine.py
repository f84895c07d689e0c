"""Processes, devices and the DeepSpeed engine. The only place, with `checkpoint`, that knows DeepSpeed."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from sacl_ds.config import OptimConfig
from sacl_ds.ds_config import zero_stage


def start_process() -> torch.device:
    """Join the job that the launcher started (or be a job of one) and return this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # a script started by its interpreter's path lacks what activation adds: ninja, for what DeepSpeed compiles
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cpu":
        # compiled at first use for a gain only in DeepSpeed's own all-reduce; gloo serves every collective
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(max(1, cores() // local_ranks()))
    else:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    name = accelerator.device_name() if accelerator.device_name() == "cpu" else accelerator.device_name(local_rank)
    return torch.device(name)


def on_cpu() -> bool:
    return get_accelerator().device_name() == "cpu"


def local_ranks() -> int:
    """Ranks of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Image encoder and the rest, each with its learning rate; weight decay on matrices only.

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


def build_engine(module: nn.Module, engine_config: dict[str, Any], optim: OptimConfig) -> DeepSpeedEngine:
    """engine_config: what `ds_config.resolve` made."""
    groups = parameter_groups(module, optim)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=engine_config)
    return engine


def set_learning_rates(engine: DeepSpeedEngine, optim: OptimConfig, factor: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = factor * (optim.lr_image if group["part"] == "image" else optim.lr_text)


def whole_state(engine: DeepSpeedEngine, module: nn.Module) -> dict[str, Tensor]:
    """All weights of `module` (a part of the engine's) in fp32 on the CPU, on rank 0; elsewhere an empty dict.

    Every rank must call it: under ZeRO 3 the shards are gathered, one parameter at a time.
    """
    first = engine.global_rank == 0
    gathered: Callable[[list[nn.Parameter]], AbstractContextManager[None]] = deepspeed.zero.GatheredParameters
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if zero_stage(engine.config) == 3:
            with gathered([parameter]):
                if first:
                    state[name] = parameter.detach().float().cpu().clone()
        elif first:
            state[name] = parameter.detach().float().cpu().clone()
    persistent = set(module.state_dict())
    for name, buffer in module.named_buffers():
        if first and name in persistent:
            state[name] = buffer.detach().cpu().clone()
    return state
