"""An ordinary DeepSpeed JSON file + the run configuration -> the dict that `deepspeed.initialize` gets.

"auto" marks what the run configuration owns. None reaches DeepSpeed: for some keys that is a crash, for others it
silently means something else. A number in the file that contradicts the run configuration is an error, never a
silent choice.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from sacl_ds.config import RunConfig
from sacl_ds.errors import UserError


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """The file as it stands. Raises UserError where it cannot be read or is no JSON object."""
    try:
        loaded = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object")
    return loaded


def resolve(ds: dict[str, Any], run: RunConfig, world: int, *, on_cpu: bool, name: str = "ds_config") -> dict[str, Any]:
    """The engine's configuration for `world` ranks.

    ds: what `read_ds_config` gave; name: how error lines call it. Raises UserError where the two contradict each other.
    """
    out = copy.deepcopy(ds)
    micro = run.micro_batch_size(world)
    _accumulation(out, name)
    _settle(out, "train_micro_batch_size_per_gpu", micro, f"train.global_batch_size / {world} ranks", name)
    _settle(out, "train_batch_size", run.train.global_batch_size, "train.global_batch_size", name)
    _settle(out, "gradient_clipping", run.optim.clip_norm, "optim.clip_norm", name)
    _optimizer(out, run, on_cpu, name)
    _precision(out, run, name)
    if "scheduler" in out:
        raise UserError(f"{name}: remove 'scheduler'; the learning rate follows optim.schedule and optim.warmup_steps")
    left = _paths_of_auto(out)
    if left:
        raise UserError(f"{name}: {left[0]} is 'auto', which nothing fills; write a value or leave it out")
    return out


def zero_stage(engine_config: dict[str, Any]) -> int:
    return int(engine_config.get("zero_optimization", {}).get("stage", 0))


def _settle(section: dict[str, Any], key: str, value: Any, owner: str, name: str) -> None:
    """Fill an absent or "auto" key with the run's value; refuse another number."""
    given = section.get(key, "auto")
    if given != "auto" and not _same(given, value):
        raise UserError(f'{name} says {key}={given}, but {owner} is {value}; write "auto" there, or make them equal')
    section[key] = value


def _same(given: Any, value: Any) -> bool:
    return (
        list(given) == list(value) if isinstance(value, (list, tuple)) and isinstance(given, list) else given == value
    )


def _accumulation(out: dict[str, Any], name: str) -> None:
    steps = out.get("gradient_accumulation_steps", "auto")
    if steps not in ("auto", 1):
        raise UserError(
            f"{name} says gradient_accumulation_steps={steps}; accumulating a contrastive loss changes its negatives "
            'and is not supported yet: write "auto" or 1'
        )
    out["gradient_accumulation_steps"] = 1


def _optimizer(out: dict[str, Any], run: RunConfig, on_cpu: bool, name: str) -> None:
    """AdamW with betas, eps and weight decay always explicit: implementations differ in their defaults."""
    optimizer = out.setdefault("optimizer", {"type": "AdamW", "params": {}})
    if optimizer.get("type") != "AdamW":
        raise UserError(f"{name}: optimizer.type={optimizer.get('type')!r}; only 'AdamW' is supported")
    params = optimizer.setdefault("params", {})
    optim = run.optim
    # each parameter group carries its own rate; this one is only the default of a group that has none
    _settle(params, "lr", optim.lr_text, "optim.lr_text", name)
    _settle(params, "betas", list(optim.betas), "optim.betas", name)
    _settle(params, "eps", optim.eps, "optim.eps", name)
    _settle(params, "weight_decay", optim.weight_decay, "optim.weight_decay", name)
    offloaded = "offload_optimizer" in out.get("zero_optimization", {})
    if on_cpu and not offloaded:
        params.setdefault("torch_adam", True)  # DeepSpeed's FusedAdam would be compiled for no gain on a CPU


def _precision(out: dict[str, Any], run: RunConfig, name: str) -> None:
    """bf16 through DeepSpeed's torch_autocast, which keeps parameters, among them the logit scale, in fp32."""
    for kind in ("bf16", "fp16"):
        enabled = out.get(kind, {}).get("enabled", False)
        if enabled and enabled != "auto":
            raise UserError(
                f"{name} says {kind}.enabled=true, which would round the logit scale to steps of 0.5; "
                "remove it and set train.precision=bf16 (autocast, parameters stay fp32)"
            )
        out.pop(kind, None)
    section = out.setdefault("torch_autocast", {})
    _settle(section, "enabled", run.train.precision == "bf16", f"train.precision={run.train.precision}: autocast", name)
    if section["enabled"]:
        _settle(section, "dtype", "bfloat16", "the dtype of train.precision=bf16", name)
    else:
        del out["torch_autocast"]


def _paths_of_auto(value: Any, path: str = "") -> list[str]:
    if value == "auto":
        return [path]
    if isinstance(value, dict):
        return [
            found for key, inner in value.items() for found in _paths_of_auto(inner, f"{path}.{key}" if path else key)
        ]
    return []
