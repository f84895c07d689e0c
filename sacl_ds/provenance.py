"""Provenance of a file: versions of the packages that decide what a run computes, and the commit of this one."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("sacl_ds", "torch", "deepspeed", "transformers", "timm", "webdataset", "safetensors")


def versions() -> dict[str, str]:
    """Return {package: version}, Python's among them; "absent" where one is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """Return the git commit of this package's checkout, with "+" where tracked files differ; "" where it is none."""
    here = Path(__file__).resolve().parent
    try:
        named = _git(here, "rev-parse", "HEAD")
        tracked = _git(here, "ls-files", "--error-unmatch", "provenance.py")
        return named + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "") if tracked else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
