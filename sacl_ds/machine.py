"""Facts about this machine: device, precision, compilers, packages. `ds_config` judges by them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Apex = Literal["nvidia", "other", "none"]


@dataclass(frozen=True)
class Machine:
    device: str  # "cpu" or an accelerator's name
    device_name: str  # for error lines
    bf16: bool
    fp16: bool
    apex: Apex
    cannot_compile: str | None  # what DeepSpeed's own operators lack to be built; None: nothing

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


def this_machine(device: str) -> Machine:
    """Gather the facts of this machine. device: the accelerator's name as DeepSpeed gives it."""
    if device == "cuda":
        name, bf16 = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        name, bf16 = f"this {device}", True
    return Machine(device, name, bf16, device != "cpu", installed_apex(), missing_tool(cuda=device == "cuda"))


def installed_apex() -> Apex:
    """Tell NVIDIA's apex, which is built from source, from the registry's apex, a web toolkit."""
    if importlib.util.find_spec("apex") is None:
        return "none"
    try:
        optimizers = importlib.import_module("apex.optimizers")
        normalization = importlib.import_module("apex.normalization")
    except Exception:  # whatever that other package raises where it is imported
        return "other"
    return "nvidia" if hasattr(optimizers, "FusedAdam") and hasattr(normalization, "FusedLayerNorm") else "other"


def missing_compiler() -> str | None:
    """Name what torch.compile would miss to build its kernels for a CPU, or to start those for a GPU."""
    compiler = os.environ.get("CXX", "g++")
    return f"no C++ compiler ({compiler})" if shutil.which(compiler) is None else None


def missing_tool(*, cuda: bool) -> str | None:
    """Name the first tool that compiling DeepSpeed's operators would miss, as PyTorch's extensions look for them."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and shutil.which("ninja", path=str(beside)) is None:
        return "no ninja"
    if cuda:
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None or shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) is None:
            return "no CUDA compiler (nvcc)"
    return None


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
