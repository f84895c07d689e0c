"""What the machine has decides what the engine gets; what it lacks is said in one line before a model is built."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starting import SMALL, launch

from sacl_ds.config_file import load_config
from sacl_ds.ds_config import EngineConfig, read_ds_config, resolve
from sacl_ds.errors import UserError
from sacl_ds.machine import Machine, installed_apex, missing_tool

CPU = Machine("cpu", "this cpu", bf16=True, fp16=False, apex="none", cannot_compile=None)
GPU = Machine("cuda", "My GPU", bf16=True, fp16=True, apex="none", cannot_compile=None)
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


def engine(ds: dict[str, Any], machine: Machine, *overrides: str) -> EngineConfig:
    return resolve(ds, load_config(None, list(overrides)), 1, machine, name="my.json", folder="run")


def adam(config: EngineConfig) -> tuple[str, Any, Any]:
    params = config.values["optimizer"]["params"]
    return config.adam, params.get("torch_adam"), params.get("fused")


def test_whose_adam() -> None:
    bare = replace(CPU, cannot_compile="no C++ compiler (c++)")
    assert adam(engine({}, CPU)) == ("PyTorch", True, True)
    assert adam(engine({}, GPU)) == ("PyTorch", True, True)
    assert adam(engine(OFFLOAD, CPU)) == ("DeepSpeed", False, None)
    assert adam(engine(OFFLOAD, GPU)) == ("DeepSpeed", False, None)
    assert adam(engine(OFFLOAD, bare)) == ("PyTorch", True, None)
    assert "no C++ compiler" in engine(OFFLOAD, bare).notes[0]
    own = {"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}
    assert adam(engine(own, GPU)) == ("DeepSpeed", False, None)
    with pytest.raises(UserError, match="cannot be built here: no C"):
        engine(own, bare)


def test_apex_is_used_where_it_is_nvidias_and_wanted() -> None:
    nvidia, other = replace(GPU, apex="nvidia"), replace(GPU, apex="other")
    assert adam(engine({}, nvidia))[0] == "apex"
    assert engine({}, nvidia).fused_norm
    assert adam(engine(OFFLOAD, nvidia))[0] == "DeepSpeed"
    assert adam(engine({}, nvidia, "kernels.apex=off"))[0] == "PyTorch"
    assert not engine({}, nvidia, "kernels.apex=off").fused_norm
    assert adam(engine({}, replace(CPU, apex="nvidia")))[0] == "PyTorch"
    assert "not NVIDIA's apex" in engine({}, other).notes[0]
    for machine, line in ((other, "another project"), (GPU, "not installed"), (CPU, "NVIDIA GPUs only")):
        with pytest.raises(UserError, match=line):
            engine({}, machine, "kernels.apex=on")


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({}, "none"),
        ({"__init__.py": "raise ImportError('pyramid')"}, "other"),
        ({"__init__.py": "", "models.py": ""}, "other"),
        (
            {
                "__init__.py": "",
                "optimizers/__init__.py": "FusedAdam = 1",
                "normalization/__init__.py": "FusedLayerNorm = 1",
            },
            "nvidia",
        ),
    ],
)
def test_which_apex_is_installed(
    files: dict[str, str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry's apex has no optimizers and fails to import without its web framework."""
    for name, text in files.items():
        (tmp_path / "apex" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "apex" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    assert installed_apex() == kind
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def test_the_registrys_apex_is_no_requirement(root: Path) -> None:
    for file in ("requirements.txt", "constraints.txt"):
        assert not [line for line in (root / file).read_text().splitlines() if line.lower().startswith("apex")]


@pytest.mark.parametrize(
    ("ds", "machine", "overrides", "parts"),
    [
        ({}, replace(GPU, bf16=False), ["train.precision=bf16"], ["My GPU has no bf16", "train.precision=fp32"]),
        ({"fp16": {"enabled": True}}, CPU, [], ["fp16.enabled=true", "train.precision=fp16"]),
        ({"wandb": {"enabled": True}}, CPU, [], ["enables wandb", "pip install wandb", "wandb.enabled to false"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/no/such"}}},
            CPU,
            [],
            ["nvme_path='/no/such' is no folder", '"cpu"'],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            CPU,
            [],
            ["stage=3"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
            replace(CPU, cannot_compile="no ninja"),
            [],
            ["async_io", "no ninja"],
        ),
    ],
)
def test_what_is_not_there(ds: dict[str, Any], machine: Machine, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        engine(ds, machine, *overrides)
    for part in parts:
        assert part in str(error.value), error.value


def test_monitors_are_off_unless_enabled_and_write_into_the_run(root: Path) -> None:
    for file in sorted((root / "ds_configs").glob("*.json")):
        values = engine(read_ds_config(file), CPU).values
        assert not {"tensorboard", "wandb", "csv_monitor"} & set(values), file
    on = engine({"csv_monitor": {"enabled": True, "output_path": "auto", "job_name": "auto"}}, CPU).values
    assert on["csv_monitor"] == {"enabled": True, "output_path": "run", "job_name": "csv_monitor"}


def test_missing_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert missing_tool(cuda=False) == "no C++ compiler (c++)"
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    assert missing_tool(cuda=False) is None  # ninja is a requirement: it lies beside the interpreter
    code = "from sacl_ds.machine import missing_tool; print(missing_tool(cuda=True))"
    env = os.environ | {"CUDA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "no CUDA compiler (nvcc)"


@pytest.mark.parametrize(
    "ds_config", [pytest.param("zero2", marks=pytest.mark.soak), pytest.param("zero3_offload", marks=pytest.mark.slow)]
)
def test_trains_without_compiler_ninja_or_activation(ds_config: str, root: Path, tmp_path: Path) -> None:
    """PATH holds nothing at all; the interpreter is named by its path."""
    done = launch(
        "--ds_config",
        f"ds_configs/{ds_config}.json",
        f"output_dir={tmp_path}/run",
        *SMALL,
        "teacher.steps=0",
        options=("--num_gpus", "1"),
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if "AdamW of PyTorch" in line]
    assert len(said) == 1
    assert "no C++ compiler (c++) here, so DeepSpeed's own operators stay off" in said[0]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 20
