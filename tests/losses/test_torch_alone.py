"""`sacl_ds.losses` is imported, and its losses run, with torch as the only package: numpy cannot be imported."""

import importlib.metadata
import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import losses_alone
import pytest


def required(distribution: str) -> set[str]:
    """Names of what a distribution needs, itself and without extras, as far as it is installed."""
    found, todo = set(), [distribution]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += [re.match(r"[\w.-]+", line)[0] for line in needed if "extra ==" not in line]
    return found


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_losses_run_with_torch_alone(backend: str) -> None:
    needed = required("torch")
    assert "numpy" not in needed
    modules = [
        module
        for module, distributions in packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", name).lower() in needed for name in distributions)
    ]
    command = [sys.executable, "-W", "ignore", losses_alone.__file__, json.dumps(modules), backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == pytest.approx(losses_alone.found(backend), rel=1e-6)


def test_the_block_blocks() -> None:
    code = "import sys; from losses_alone import Blocker; sys.meta_path.insert(0, Blocker(['torch'])); import numpy"
    folder = losses_alone.__file__.rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'numpy': it is blocked" in done.stderr
