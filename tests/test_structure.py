"""Imports point one way, and light things stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# each room may import those named here (and the standard library and what is installed)
ALLOWED = {
    "atomic": set(),
    "provenance": set(),
    "errors": set(),
    "config": {"config", "errors"},
    "yaml_files": {"errors"},
    "config_file": {"config", "errors", "yaml_files"},
    "config_help": {"config", "errors"},
    "machine": set(),
    "ds_file": {"errors"},
    "ds_config": {"config", "ds_file", "errors", "machine"},
    "command_line": {"config", "config_file", "config_help", "distributed", "errors", "faults"},
    "distributed": {"errors"},
    "losses": {"distributed", "losses"},
    "faults": {"atomic", "errors", "faults"},
    "data": {"config", "data", "errors"},
    "model": {"config", "config_file", "data", "distributed", "errors", "model"},
    "telemetry": {"telemetry", "errors", "config"},
    "evaluation": {"atomic", "config", "data", "distributed", "errors", "evaluation", "model", "telemetry"},
    "analysis": {
        "analysis", "command_line", "config", "config_file", "data", "distributed", "ds_config", "errors", "evaluation",
        "losses", "machine", "model", "telemetry", "training",
    },
    "tasks": {
        "atomic", "command_line", "config", "config_file", "data", "distributed", "errors", "evaluation", "faults",
        "losses", "model", "tasks", "telemetry", "training",
    },
    "benchmark": {
        "benchmark", "config", "data", "distributed", "ds_config", "errors", "losses", "machine", "model", "telemetry",
        "training",
    },
    "doctor": {"command_line", "data", "doctor", "errors", "machine"},
    "exporting": {"atomic", "config", "config_file", "data", "errors", "exporting", "model", "tasks", "telemetry"},
    "inference": {"data", "errors", "model"},
    "study": {
        "analysis", "config", "data", "errors", "evaluation", "losses", "model", "study", "training", "yaml_files",
    },
    "planning": {"config", "config_file", "ds_config", "errors", "model", "planning"},
    "training": {
        "atomic", "config", "data", "distributed", "ds_config", "errors", "faults", "losses", "machine", "model",
        "provenance", "telemetry", "training", "yaml_files",
    },
}  # fmt: skip
HEAVY = ("torch", "deepspeed", "timm", "transformers", "webdataset")


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_directions(root: Path) -> None:
    files = [f for f in (root / "sacl_ds").rglob("*.py") if f != root / "sacl_ds/__init__.py"]
    assert len(files) > 20
    for file in files:
        room = file.relative_to(root / "sacl_ds").parts[0].removesuffix(".py")
        ours = {name.split(".")[1] for name in imports(file) if name.startswith("sacl_ds.")}
        assert ours <= ALLOWED[room], f"{file} imports {ours - ALLOWED[room]}"
        if room != "training":
            assert not any(name.split(".")[0] == "deepspeed" for name in imports(file)), file


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sacl_ds", HEAVY),
        ("sacl_ds.config", HEAVY),
        ("sacl_ds.command_line", HEAVY),
        ("sacl_ds.faults.guard", HEAVY),
        ("sacl_ds.data.making.writer", HEAVY),
        ("sacl_ds.data.making.record_lists", (*HEAVY, "pyarrow")),
        ("sacl_ds.losses", ("deepspeed", "timm", "transformers", "webdataset", "pydantic", "yaml")),
    ],
)
def test_light_imports(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
