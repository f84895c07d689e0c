"""Findings about one node or between nodes, with remedies. Pure: judged from gathered facts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sacl_ds.doctor.facts import Facts

CLOCKS = 5.0  # seconds that clocks may differ, beside what the asking itself took
_DISK, _SHM, _MEMORY = 20.0, 2.0, 4.0  # GB: where there is less, it is said; memory for each rank
_SLOW = 5.0  # GB/s between GPUs of several nodes
_SILENCE = 120.0  # seconds until ssh gives up a node


@dataclass(frozen=True)
class Finding:
    wrong: bool  # must be put right; otherwise to be known
    what: str
    do: str


@dataclass(frozen=True)
class Contact:
    """Answer of a node over ssh."""

    error: str | None = None
    clock: float = 0.0  # seconds that it is ahead of the asking machine
    uncertain: float = 0.0  # seconds, half of what the answer took


@dataclass(frozen=True)
class AllReduce:
    """Result of the all-reduce. error: why there is no figure; None where it went well."""

    error: str | None = None
    ranks: int = 0
    megabytes: float = 0.0
    bandwidth: float = 0.0  # GB/s that a rank sends and receives: 2 (W-1)/W of the tensor, over the median time
    backend: str = ""


@dataclass(frozen=True)
class Examination:
    """Questions and answers of an examination. Nodes in the order of the hostfile; one without a hostfile."""

    slots: dict[str, int]
    facts: dict[str, Facts]
    contacts: dict[str, Contact] = field(default_factory=dict)
    gather_errors: dict[str, str] = field(default_factory=dict)  # of nodes that answer but have no facts
    master: str | None = None
    port: int = 29500
    output_dir: str | None = None
    token_error: str | None = None
    keep_alive: float | None = None  # seconds until ssh gives up a silent node; 0: never; None: not known
    env_error: str | None = None
    interface_named: bool = False  # GLOO_SOCKET_IFNAME travels
    all_reduce: AllReduce | None = None

    @property
    def several(self) -> bool:
        return len(self.slots) > 1


def judge(seen: Examination) -> list[Finding]:
    """List the findings: first what must be put right, then what is good to know; each in a fixed order."""
    found = [*_reached(seen), *_equal(seen), *_devices(seen), *_room(seen), *_data(seen), *_network(seen)]
    return sorted(found, key=lambda finding: not finding.wrong)


def groups(values: Mapping[str, Any]) -> list[tuple[Any, list[str]]]:
    """Group nodes by value, the most common value first (of equals, the one that comes first)."""
    by: dict[Any, list[str]] = {}
    for node, value in values.items():
        by.setdefault(value, []).append(node)
    return sorted(by.items(), key=lambda entry: -len(entry[1]))


def _differing(seen: Examination, name: str, of: Callable[[Facts], Any], do: str, wrong: bool = True) -> list[Finding]:
    """Return a finding where the nodes do not agree."""
    values = groups({node: of(facts) for node, facts in seen.facts.items()})
    if len(values) < 2:
        return []
    parts = [f"{'none' if value is None else value} on {_names(nodes)}" for value, nodes in values]
    return [Finding(wrong, f"{name} differs: {'; '.join(parts)}", do)]


def _names(nodes: Iterable[str]) -> str:
    nodes = list(nodes)
    return ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")


def _where(seen: Examination, holds: Callable[[str, Facts], bool]) -> str:
    """Name the nodes of which something holds; '' for none."""
    return _names(node for node, facts in seen.facts.items() if holds(node, facts))


def _reached(seen: Examination) -> list[Finding]:
    found = []
    for node, contact in seen.contacts.items():
        if contact.error:
            found.append(
                Finding(
                    True,
                    f"{node} does not answer over ssh: {contact.error}",
                    f"make `ssh -o BatchMode=yes {node} true` work without a question: its name or address, sshd, "
                    "a key in authorized_keys, its host key in known_hosts",
                )
            )
    for node, error in seen.gather_errors.items():
        found.append(
            Finding(
                True,
                f"{node} answers, but `python -m sacl_ds.doctor` does not run there: {error}",
                "the same Python environment and code at the same path on every node, and variables that must travel "
                "in .deepspeed_env",
            )
        )
    if seen.env_error:
        found.append(Finding(True, seen.env_error, "correct that line; see launch/deepspeed_env.example"))
    return found


def _equal(seen: Examination) -> list[Finding]:
    found = []
    packages = dict.fromkeys(name for facts in seen.facts.values() for name in facts.versions)
    for name in packages:
        if absent := _where(seen, lambda _, facts, name=name: facts.versions.get(name) is None):  # type: ignore[misc]
            found.append(Finding(True, f"{name} is not installed on {absent}", "install it: pip install -e . there"))
            continue
        do = f"install one version of {name} on all nodes, or share one environment"
        found += _differing(seen, name, lambda facts, name=name: facts.versions.get(name), do)  # type: ignore[misc]
    found += _differing(seen, "the code's commit", lambda facts: facts.git, "check out one commit everywhere")
    found += _differing(seen, "device", lambda facts: facts.device, "leave out the nodes without GPUs, or mend those")
    found += _differing(seen, "NCCL", lambda facts: facts.nccl, "one build of torch everywhere")
    found += _differing(seen, "CUDA", lambda facts: facts.cuda, "one build of torch everywhere")
    found += _differing(seen, "the driver", lambda facts: facts.driver, "one driver everywhere, if you can", False)
    kinds = lambda facts: ", ".join(sorted(set(facts.gpus))) or None  # noqa: E731
    return found + _differing(seen, "the GPU", kinds, "every step waits for the slowest: nodes of one kind", False)


def _devices(seen: Examination) -> list[Finding]:
    found = []
    for node, facts in seen.facts.items():
        if facts.device == "cuda" and len(facts.gpus) < seen.slots[node]:
            what = f"{node} has {len(facts.gpus)} GPUs for slots={seen.slots[node]}"
            found.append(Finding(True, what, "correct its slots in the hostfile, or CUDA_VISIBLE_DEVICES there"))
    found += _differing(seen, "apex", lambda facts: facts.apex, "install NVIDIA's apex on all nodes or none")
    if nodes := _where(seen, lambda _, facts: facts.apex == "other"):
        what = f"the package called apex on {nodes} is not NVIDIA's"
        found.append(Finding(False, what, "pip uninstall apex; docs/configuration.md says how to build NVIDIA's"))
    found += _differing(
        seen, "what compiling lacks", lambda facts: facts.missing_tool, "one environment, so that all take one AdamW"
    )
    lacking = {node: facts.missing_tool for node, facts in seen.facts.items() if facts.missing_tool}
    if lacking:
        what = f"DeepSpeed's own operators cannot be built on {_names(lacking)}: {next(iter(lacking.values()))}"
        found.append(Finding(False, what, "install it, or go on: PyTorch's AdamW is used"))
    return found


def _room(seen: Examination) -> list[Finding]:
    found = []
    for node, facts in seen.facts.items():
        if facts.disk_free is not None and facts.disk_free < _DISK:
            what = f"{node}: {facts.disk_free:.1f} GB free at output_dir"
            found.append(Finding(False, what, "make room: a checkpoint takes 12 bytes a parameter, the weights 4"))
        if facts.shm_free is not None and facts.shm_free < _SHM:
            what = f"{node}: {facts.shm_free:.1f} GB free in /dev/shm, through which data.workers hand batches"
            found.append(Finding(False, what, "docker run --shm-size=16g, or data.workers=0"))
        if facts.memory_free < _MEMORY * seen.slots[node]:
            what = f"{node}: {facts.memory_free:.1f} GB of memory free for {seen.slots[node]} ranks"
            found.append(Finding(False, what, "end what else runs there, or fewer slots or data.workers"))
    return found


def _data(seen: Examination) -> list[Finding]:
    found = []
    for node, facts in seen.facts.items():
        if facts.shards_error:
            do = "the same shards at the same path on every node" if seen.several else "correct --shards"
            found.append(Finding(True, f"{node}: {facts.shards_error}", do))
        if facts.writes is False:
            what = f"{node} cannot write to output_dir={seen.output_dir}"
            found.append(Finding(True, what, "one folder that all nodes share and may write to"))
    read = {node: facts for node, facts in seen.facts.items() if facts.shards_error is None}
    of_read = Examination(seen.slots, read)
    found += _differing(of_read, "the number of shards", lambda facts: facts.shards, "the same shards on every node")
    for shard in dict.fromkeys(name for facts in read.values() for name in facts.samples):
        found += _differing(
            of_read,
            f"the samples of {shard}",
            lambda facts, shard=shard: facts.samples.get(shard),  # type: ignore[misc]
            "copy that shard anew: ranks would train on different data",
        )
    if seen.token_error:
        what = f"no file can be written to output_dir={seen.output_dir}: {seen.token_error}"
        found.append(Finding(True, what, "a folder that all nodes share and may write to"))
    if blind := _where(seen, lambda _, facts: facts.sees_token is False):
        what = f"{blind} does not see what {next(iter(seen.slots))} writes into output_dir={seen.output_dir}"
        found.append(Finding(True, what, "a folder on a file system that all nodes mount at the same path"))
    return found


def _network(seen: Examination) -> list[Finding]:
    found = []
    if deaf := _where(seen, lambda _, facts: facts.reaches_master is False):
        what = f"{deaf} cannot reach {seen.master} port {seen.port}, where ranks meet"
        do = "deepspeed --master_addr ADDRESS with one that all nodes reach, or open the firewall between nodes"
        found.append(Finding(True, what, do))
    found += _clocks(seen)
    cpu = any(facts.device == "cpu" for facts in seen.facts.values())
    loopback = _where(seen, lambda _, facts: facts.own_name_is_loopback)
    if seen.several and cpu and loopback and not seen.interface_named:
        what = f"the own name of {loopback} is a loopback address, where gloo would listen"
        found.append(Finding(True, what, "GLOO_SOCKET_IFNAME=eth0 (the network's interface) in .deepspeed_env"))
    if seen.several and seen.keep_alive is not None and not 0 < seen.keep_alive <= _SILENCE:
        after = f"ends {seen.keep_alive:.0f} s later" if seen.keep_alive else "never ends"
        what = f"ssh without a short keep-alive: where a node's network is cut, `deepspeed --hostfile` {after}"
        do = 'export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=10 -o ServerAliveCountMax=3"'
        found.append(Finding(False, what, do))
    return found + _bandwidth(seen)


def _clocks(seen: Examination) -> list[Finding]:
    told = {node: contact for node, contact in seen.contacts.items() if contact.error is None}
    if not told:
        return []
    ahead = max(told, key=lambda node: told[node].clock)
    behind = min(told, key=lambda node: told[node].clock)
    apart = told[ahead].clock - told[behind].clock
    if apart - told[ahead].uncertain - told[behind].uncertain <= CLOCKS:
        return []
    what = f"the clock of {ahead} is {apart:.0f} s ahead of that of {behind}"
    return [Finding(True, what, "run chrony or systemd-timesyncd on all nodes")]


def _bandwidth(seen: Examination) -> list[Finding]:
    took = seen.all_reduce
    if took is None:
        return []
    if took.error:
        do = "what ranks send to each other: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME in .deepspeed_env, all ports open"
        if not seen.several:
            do = "try NCCL_DEBUG=INFO, NCCL_P2P_DISABLE=1" if "nccl" in took.error else "see the lines above"
        return [Finding(True, f"the all-reduce over all ranks failed: {took.error}", do)]
    if took.backend == "nccl" and seen.several and took.bandwidth < _SLOW:
        what = f"the all-reduce over nodes reaches {took.bandwidth:.1f} GB/s a rank"
        do = "see with NCCL_DEBUG=INFO whether NCCL found InfiniBand or RoCE; NCCL_IB_HCA, NCCL_SOCKET_IFNAME"
        return [Finding(False, what, do)]
    return []
