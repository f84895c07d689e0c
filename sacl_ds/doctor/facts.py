"""Facts of one node, gathered on the node itself and sent as JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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


PACKAGES = ("torch", "deepspeed", "transformers", "timm", "webdataset")
_SHARDS = 5  # looked into: the first, the last and some between
_SECONDS = 5.0  # for the master's address to answer


@dataclass(frozen=True)
class Request:
    """Questions to a node."""

    output_dir: str | None = None
    shards: str | None = None
    allow_missing: int = 0  # of the shards
    token: str | None = None  # name of a file that another node wrote into output_dir
    master: str | None = None  # address and port of the first node
    port: int = 29500


@dataclass(frozen=True)
class Facts:
    """Facts of a node. Sizes in GB (1e9 bytes). None: not there, or not known."""

    host: str
    versions: dict[str, str | None]
    git: str | None  # commit of the code, with a + where files are changed
    device: str  # "cuda" or "cpu"
    gpus: list[str] = field(default_factory=list)  # names
    driver: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    apex: str = "none"
    missing_tool: str | None = None
    cores: int = 1
    memory: float = 0.0
    memory_free: float = 0.0
    shm_free: float | None = None
    disk_free: float | None = None  # at output_dir
    shards: int | None = None  # how many of the pattern are there
    samples: dict[str, int] = field(default_factory=dict)  # of those looked into
    shards_error: str | None = None
    sees_token: bool | None = None
    writes: bool | None = None  # into output_dir
    reaches_master: bool | None = None
    own_name_is_loopback: bool = False

    def json(self) -> dict[str, Any]:
        return asdict(self)


def gather(request: Request) -> Facts:
    """Gather this node's facts. Takes the seconds in which torch is imported."""
    import psutil
    import torch

    from sacl_ds.machine import installed_apex, missing_tool

    cuda = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    memory = psutil.virtual_memory()
    folder = Path(request.output_dir) if request.output_dir else None
    shards, samples, error = _shards(request.shards, request.allow_missing)
    return Facts(
        host=socket.gethostname(),
        versions=_versions(),
        git=_git(),
        device="cuda" if cuda else "cpu",
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        driver=_driver() if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        apex=installed_apex(),
        missing_tool=missing_tool(cuda=cuda),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        memory=memory.total / 1e9,
        memory_free=memory.available / 1e9,
        shm_free=_free(Path("/dev/shm")),
        disk_free=_free(folder) if folder else None,
        shards=shards,
        samples=samples,
        shards_error=error,
        sees_token=(folder / request.token).is_file() if folder and request.token else None,
        writes=_writable(folder) if folder else None,
        reaches_master=answers(request.master, request.port) if request.master else None,
        own_name_is_loopback=_own_name_is_loopback(),
    )


def answers(address: str, port: int) -> bool:
    """Return whether packets come back: a refusal is an answer, silence is a firewall or another network."""
    try:
        with socket.create_connection((address, port), timeout=_SECONDS):
            return True
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def _versions() -> dict[str, str | None]:
    from sacl_ds import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "sacl_ds": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _git() -> str | None:
    root = Path(__file__).parent
    commit = _said("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if _said("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", ".") else "")


def _driver() -> str | None:
    line = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return line.splitlines()[0] if line else None


def _said(*command: str) -> str | None:
    """Run a command and return its output; None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _free(folder: Path) -> float | None:
    """Return the GB free on the disk where this folder is, or would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free / 1e9
    except OSError:
        return None


def _writable(folder: Path) -> bool:
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _shards(pattern: str | None, allow_missing: int) -> tuple[int | None, dict[str, int], str | None]:
    """Return the number of shards, the samples of some of them, and what went wrong."""
    if pattern is None:
        return None, {}, None
    from sacl_ds.data.shards.patterns import is_gone, missing_shards, named
    from sacl_ds.data.shards.tars import BadShard, count_in
    from sacl_ds.errors import UserError

    count, samples = None, {}
    try:
        every = named(pattern, "--shards")
        shards = [shard for shard in every if not is_gone(shard)]
        if len(every) - len(shards) > allow_missing or not shards:
            gone = [shard for shard in every if is_gone(shard)]
            raise missing_shards(gone, len(every), pattern, "--shards")
        count = len(shards)
        last = len(shards) - 1
        for shard in dict.fromkeys(shards[last * i // (_SHARDS - 1)] for i in range(_SHARDS)):
            try:
                samples[shard] = count_in(shard)
            except (BadShard, OSError) as error:
                return count, samples, f"{shard} cannot be read: {error}"
    except UserError as error:
        return count, samples, str(error)
    return count, samples, None


def _own_name_is_loopback() -> bool:
    """Return whether the host name resolves to loopback (127.0.1.1 on Debian), where gloo would listen."""
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return False
