"""Resolution of a DeepSpeed JSON file and the run configuration to the dict that `deepspeed.initialize` gets.

"auto" marks what the run configuration owns. None reaches DeepSpeed: for some keys that is a crash, for others it
silently means something else. A number in the file that contradicts the run configuration is an error, never a silent
choice.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sacl_ds.config import TrainingConfig
from sacl_ds.errors import UserError
from sacl_ds.machine import Machine, has_package, missing_compiler

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "comet": "comet_ml"}  # and packages
_SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "optimizer",
    "optimizer.params", "bf16", "fp16", "torch_autocast", *MONITORS,
)  # fmt: skip
_MAY_BE_NULL = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_DEEPEST = 20  # sections in sections


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read the file without resolving it. Raises UserError where it cannot be read, is no JSON object or names a key
    twice."""
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except OSError as error:
        raise UserError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not valid JSON: {said}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object")
    return loaded


def check_sections(ds: dict[str, Any], name: str) -> None:
    """Raises UserError for a section that is no object, a ZeRO stage that there is not, and endless nesting."""
    _check_depth(ds, name, 0)
    for section in _SECTIONS:
        value: Any = ds
        for part in section.split("."):
            value = value.get(part, {}) if isinstance(value, dict) else {}
        if not isinstance(value, dict) and not (value is None and section in _MAY_BE_NULL):
            raise UserError(f"{name}: {section} is an object of DeepSpeed's, {{...}}, not {repr(value)[:80]}")
        device = (value or {}).get("device", "none") if section in _MAY_BE_NULL else "none"
        if device not in ("none", "cpu", "nvme"):
            raise UserError(f'{name}: {section}.device={repr(device)[:80]}; write "cpu", "nvme" or "none"')
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"{name}: zero_optimization.stage={repr(stage)[:80]}; choose 0, 1, 2 or 3")


def _check_depth(value: Any, name: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise UserError(f"{name}: more than {_DEEPEST} objects within each other")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, name, depth + 1)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(each for each in names if names.count(each) > 1)!r} stands twice in one object"
        )
    return made


__all__ = ["MONITORS", "EngineConfig", "offload_device", "read_ds_config", "resolve", "zero_stage"]

_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class EngineConfig:
    """Resolved engine configuration, the owner of its AdamW, and notes for the user."""

    values: dict[str, Any]
    adam: Literal["PyTorch", "DeepSpeed", "apex"]
    fused_norm: bool  # apex's FusedLayerNorm in the model
    notes: tuple[str, ...]


def resolve(
    ds: dict[str, Any], run: TrainingConfig, world: int, machine: Machine, *, name: str = "ds_config", folder: str = "."
) -> EngineConfig:
    """Resolve the engine's configuration for `world` ranks.

    ds: what `read_ds_config` gave; name: how error lines call it; folder: the run directory, where monitors write.
    Raises UserError where file and run contradict each other, or ask for what the machine does not have.
    """
    check_sections(ds, name)
    out = copy.deepcopy(ds)
    _batch(out, run, world, name)
    _settle(out, "gradient_clipping", run.optim.clip_norm, "optim.clip_norm", name)
    _precision(out, run, machine, name)
    _offload(out, machine, name)
    _compilation(out, run, name)
    _monitors(out, name, folder)
    notes: list[str] = []
    use_apex = _apex(run, machine, notes)
    adam = _optimizer(out, run, machine, use_apex, name, notes)
    if "scheduler" in out:
        raise UserError(f"{name}: remove 'scheduler'; the learning rate follows optim.schedule and optim.warmup_steps")
    left = _paths_of_auto(out)
    if left:
        raise UserError(f"{name}: {left[0]} is 'auto', which nothing fills; write a value or leave it out")
    return EngineConfig(out, adam, use_apex, tuple(notes))


def zero_stage(engine_config: dict[str, Any]) -> int:
    return int(engine_config.get("zero_optimization", {}).get("stage", 0))


def _compilation(out: dict[str, Any], run: TrainingConfig, name: str) -> None:
    """Raises UserError where blocks cannot be compiled."""
    if not run.kernels.compile:
        return
    if lacking := missing_compiler():
        raise UserError(
            f"kernels.compile=true: {lacking} here, which torch.compile needs; install one, or set "
            "kernels.compile=false"
        )
    if zero_stage(out) == 3:
        raise UserError(
            f"{name}: zero_optimization.stage=3 does not go with kernels.compile=true, since parameters are gathered "
            "within each block; take a stage below 3, or set kernels.compile=false"
        )


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


def _batch(out: dict[str, Any], run: TrainingConfig, world: int, name: str) -> None:
    """The file may state what the run does; DeepSpeed itself is told of one whole batch a step.

    It would divide the loss by its accumulation steps, and end a step after so many calls, where this project's
    `training.step` has weighted its parts and says by flags which of them is the last.
    """
    micro, passes = run.micro_batches(world)
    rows = f"train.global_batch_size / {world} ranks"
    owner = "train.micro_batch_size" if run.train.micro_batch_size else rows
    _settle(out, "train_micro_batch_size_per_gpu", micro, owner, name)
    _settle(out, "gradient_accumulation_steps", passes, f"{rows} / train.micro_batch_size", name)
    _settle(out, "train_batch_size", run.train.global_batch_size, "train.global_batch_size", name)
    out |= {"train_micro_batch_size_per_gpu": micro * passes, "gradient_accumulation_steps": 1}


def _apex(run: TrainingConfig, machine: Machine, notes: list[str]) -> bool:
    """Return whether NVIDIA's apex is used."""
    asked = run.kernels.apex
    if asked == "off":
        return False
    if asked == "on" and machine.on_cpu:
        raise UserError("kernels.apex=on, but apex runs on NVIDIA GPUs only; leave it at auto")
    if machine.apex == "other":
        told = "the package 'apex' installed here is not NVIDIA's apex but another project of that name"
        if asked == "on":
            raise UserError(f"kernels.apex=on: {told}; remove it (pip uninstall apex) and see docs/configuration.md")
        notes.append(f"{told}; not used")
    if asked == "on" and machine.apex == "none":
        raise UserError("kernels.apex=on, but NVIDIA's apex is not installed; see docs/configuration.md")
    return machine.apex == "nvidia" and not machine.on_cpu


def _optimizer(
    out: dict[str, Any], run: TrainingConfig, machine: Machine, use_apex: bool, name: str, notes: list[str]
) -> Literal["PyTorch", "DeepSpeed", "apex"]:
    """AdamW with betas, eps and weight decay always explicit: implementations differ in their defaults.

    Whose: with offload DeepSpeed's CPU Adam, else apex's where it is used, else PyTorch's (fused). The file's
    own word, `torch_adam`, goes first.
    """
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
    given = params.get("torch_adam", "auto")
    if given not in ("auto", True, False):
        raise UserError(f'{name}: optimizer.params.torch_adam={given!r}; write true, false or "auto"')
    offloaded = offload_device(out, "offload_optimizer") is not None
    if given is False and machine.cannot_compile:
        raise UserError(
            f"{name} says torch_adam=false, but DeepSpeed's AdamW cannot be built here: {machine.cannot_compile}; "
            'write "auto" there'
        )
    if given == "auto" and use_apex and not offloaded:
        params.pop("torch_adam", None)
        return "apex"
    if given == "auto" and offloaded and machine.cannot_compile:
        notes.append(f"{machine.cannot_compile}: PyTorch's AdamW instead of DeepSpeed's for the offloaded state")
    params["torch_adam"] = given if given != "auto" else not offloaded or machine.cannot_compile is not None
    if params["torch_adam"] and not offloaded:
        params.setdefault("fused", True)
    return "PyTorch" if params["torch_adam"] else "DeepSpeed"


def offload_device(engine_config: dict[str, Any], part: str) -> str | None:
    """Return the device of a part, offload_optimizer or offload_param: "cpu", "nvme", or None."""
    device = (engine_config.get("zero_optimization", {}).get(part) or {}).get("device", "none")
    return None if device == "none" else str(device)


def _offload(out: dict[str, Any], machine: Machine, name: str) -> None:
    """Settle offloading; NVMe is refused where its path or its operator is missing."""
    for part in ("offload_optimizer", "offload_param"):
        if offload_device(out, part) != "nvme":
            continue
        section = out["zero_optimization"][part]
        path = section.get("nvme_path")
        if zero_stage(out) != 3:
            raise UserError(f'{name}: {part} to nvme needs zero_optimization.stage=3; or offload to "cpu"')
        if not isinstance(path, str) or not os.path.isdir(path) or not os.access(path, os.W_OK):
            raise UserError(
                f"{name}: {part}.nvme_path={path!r} is no folder that can be written to; give one on the NVMe disk, "
                'or offload to "cpu"'
            )
        if machine.cannot_compile:
            raise UserError(
                f"{name}: {part} to nvme needs DeepSpeed's async_io operator, which cannot be built here: "
                f'{machine.cannot_compile}; offload to "cpu"'
            )


def _monitors(out: dict[str, Any], name: str, folder: str) -> None:
    """Settle DeepSpeed's monitor sections: off unless enabled; "auto" paths lie in the run directory."""
    for kind, package in MONITORS.items():
        section = out.get(kind)
        if section is None:
            continue
        if section.get("enabled", False) is not True:
            del out[kind]
            continue
        if package is not None and not has_package(package):
            raise UserError(
                f"{name} enables {kind}, but the package {package} is not installed: pip install {package}, "
                f"or set {kind}.enabled to false"
            )
        for key, value in (("output_path", folder), ("job_name", kind)):
            if section.get(key) == "auto":
                section[key] = value


def _precision(out: dict[str, Any], run: TrainingConfig, machine: Machine, name: str) -> None:
    """Half precision through DeepSpeed's torch_autocast, which keeps parameters, among them the logit scale, in fp32.

    With float16 it scales the loss, too.
    """
    for kind in ("bf16", "fp16"):
        enabled = out.get(kind, {}).get("enabled", False)
        if enabled and enabled != "auto":
            raise UserError(
                f"{name} says {kind}.enabled=true, which would round the logit scale to steps of 0.5; "
                f"remove it and set train.precision={kind} (autocast, parameters stay fp32)"
            )
        out.pop(kind, None)
    precision = run.train.precision
    for kind, has_it in (("bf16", machine.bf16), ("fp16", machine.fp16)):
        if precision == kind and not has_it:
            other = "fp32" if not machine.bf16 else "bf16"
            raise UserError(
                f"train.precision={kind}, but {machine.device_name} has no {kind}; set train.precision={other}"
            )
    if precision == "fp16" and zero_stage(out):
        # they clip gradients, and look for overflow, before the loss's scale is taken out of them (0.19.8)
        raise UserError(
            f"{name}: zero_optimization.stage={zero_stage(out)} clips gradients of fp16 before DeepSpeed takes the "
            "loss's scale out of them; set train.precision=bf16 or fp32, or zero_optimization.stage to 0"
        )
    section = out.setdefault("torch_autocast", {})
    _settle(section, "enabled", precision != "fp32", f"train.precision={precision}: autocast", name)
    if section["enabled"]:
        _settle(section, "dtype", _DTYPES[precision], f"the dtype of train.precision={precision}", name)
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
