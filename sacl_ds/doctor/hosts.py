"""Files of DeepSpeed's launcher: the hostfile, and .deepspeed_env with the variables that travel to every node."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sacl_ds.errors import UserError

_ENTRY = re.compile(r"(\S+)\s+slots=(\d+)")
_NAME = re.compile(r"\s*[A-Za-z_]\w*\s*")
_TRAVELS = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # DeepSpeed's own list, and that of its CUDA accelerator


def read_hostfile(path: str) -> dict[str, int]:
    """Read node -> slots (ranks), in order. Raises UserError where it is missing or DeepSpeed would not take it."""
    try:
        return parse_hostfile(Path(path).read_text(), path)
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--hostfile {path} cannot be read; correct the path, or leave it out for one machine"
        ) from None


def parse_hostfile(text: str, path: str) -> dict[str, int]:
    """Parse a hostfile's text as `read_hostfile` does. Empty lines and lines that begin with # are skipped."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        entry = _ENTRY.match(line)
        if entry is None or not int(entry[2]):
            raise UserError(f"--hostfile {path}, line {number}: {line!r} is no entry; write e.g. node1 slots=8")
        if entry[1] in hosts:
            raise UserError(f"--hostfile {path}, line {number}: {entry[1]} is named twice; name each node once")
        hosts[entry[1]] = int(entry[2])
    if not hosts:
        raise UserError(f"--hostfile {path} names no node; write a line for each, e.g. node1 slots=8")
    return hosts


def env_files() -> list[Path]:
    """List the .deepspeed_env files that exist, in the order in which the launcher reads them."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = [Path.home() / name, Path(name).absolute()]  # an absolute name is the same file twice
    return [file for file in dict.fromkeys(files) if file.is_file()]


def parse_env_file(text: str, path: str) -> dict[str, str]:
    """Parse lines NAME=VALUE, by the launcher's rules. Raises UserError for a line that would crash the launcher, an
    empty one among them."""
    values = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        name, separator, value = line.partition("=")
        if not separator or not _NAME.fullmatch(name):
            shown = repr(line) if line.strip() else "an empty line"
            raise UserError(
                f"{path}, line {number}: {shown} stops DeepSpeed's launcher; write NAME=VALUE on every line"
            )
        values[name.strip()] = value.strip()
    return values


def travelling() -> dict[str, str]:
    """Return the variables that DeepSpeed's launcher sets on every node. Raises UserError for a bad .deepspeed_env."""
    values = {name: value for name, value in os.environ.items() if name.startswith(_TRAVELS)}
    values["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    for file in env_files():
        values |= parse_env_file(file.read_text(), str(file))
    return values
