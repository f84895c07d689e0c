"""Rank of this process among those of its job, whichever launcher started it.

DeepSpeed's launcher and torchrun set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which
is what everything reads. srun and the mpiruns have names of their own.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping

from sacl_ds.errors import UserError

# of the rank, the ranks, the rank on its node, the ranks there
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
)
_MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid", "PMI_JOBID", "SLURM_JOB_ID")
_NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_SPECIAL_STEPS = 0xFFFFFFF0  # from here on SLURM's own: a batch script's shell, an interactive one


def take_place() -> None:
    """Set RANK and its like in the environment from the variables of srun or mpirun, before anything reads them.

    Nothing changes where RANK is set, or where this process was started alone: by hand, in the shell of a batch script
    or of salloc. Raises UserError where the ranks are on several nodes and the first one's address is not known.
    """
    env = os.environ
    if "RANK" in env:
        return
    place = next((each for each in map(_of_mpi, _MPI) if each is not None), None)
    by_mpi = place is not None
    place = place or _of_srun()
    if place is None or place["WORLD_SIZE"] == "1":
        return
    one_node = place["LOCAL_WORLD_SIZE"] == place["WORLD_SIZE"]
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if one_node else _first_node(env))
    env.update(place)
    if address is None:
        raise UserError(
            f"{place['WORLD_SIZE']} ranks on several nodes, and nothing says the address of the first node; give it: "
            "mpirun -x MASTER_ADDR=node1 ..., or export MASTER_ADDR=node1 before srun"
        )
    env["MASTER_ADDR"] = address
    env.setdefault("MASTER_PORT", str(10000 + _number_of_job(by_mpi) % 20000))  # below those that systems give away


def _of_mpi(names: tuple[str, str, str, str]) -> dict[str, str] | None:
    number, count, local, local_count = (os.environ.get(name) for name in names)
    if number is None or count is None or local is None:
        return None
    return _place(number, count, local, local_count or count)


def _of_srun() -> dict[str, str] | None:
    """Read srun's variables; None for a process that is no task of srun's, or typed into an srun --pty shell."""
    env = os.environ
    number, count = env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS")
    step = env.get("SLURM_STEP_ID") or env.get("SLURM_STEPID")
    if number is None or count is None or "SLURM_PTY_PORT" in env:
        return None
    if step is None:
        # a batch script's shell is task 0 of no step; it knows its nodes, which a container may not be told
        if number == "0" and any(name in env for name in _NODES):
            return None
    elif not step.isdecimal() or int(step) >= _SPECIAL_STEPS:
        return None
    tasks = _expanded(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    node = int(env.get("SLURM_NODEID", "0"))
    nodes = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or "1"
    local_count = str(tasks[node]) if node < len(tasks) else count if nodes == "1" else "1"
    return _place(number, count, env.get("SLURM_LOCALID", "0"), count if nodes == "1" else local_count)


def _place(number: str, count: str, local: str, local_count: str) -> dict[str, str]:
    return {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": local_count}


def _expanded(tasks: str) -> list[int]:
    """Expand SLURM's tasks of each node, "2(x3),1" for four nodes."""
    found: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        found += [int(number)] * int(times or 1)
    return found


def _first_node(env: Mapping[str, str]) -> str | None:
    """Return the first name of SLURM's node list, which looks like "gpu-[03-05,7],login1"."""
    nodes = next((env[name] for name in _NODES if env.get(name)), None)
    if nodes is None:
        return None
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return None if first is None else re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", first[0])


def _number_of_job(by_mpi: bool) -> int:
    """Return a number that is equal on all ranks, and differs from that of a job or step started close by."""
    env = os.environ
    if not by_mpi:
        return 61 * int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
    return zlib.crc32(next((env[name] for name in _MPI_JOBS if env.get(name)), "").encode())
