"""Several nodes on one machine: network namespaces on a switch, with an sshd in each.

A node has its own network, processes, mounts, host name, /dev/shm and cores, and shares the file system, as nodes of a
cluster share a network drive. `deepspeed --hostfile` runs on them over pdsh and ssh as it does on machines:

    with cluster(tmp_path) as nodes:
        run = nodes.deepspeed("launch/pretrain.py", "--ds_config", "ds_configs/zero2.json", ...)  # from the first node
        run.wait_for("step", seconds=60)
        nodes[1].cut()                         # or .kill_processes(), .power_off()
        assert run.wait(seconds=90) != 0
        print(run.text())

Nothing of this is seen from outside: addresses are those of the switch alone, keys lie in the folder given, /etc/ssh
and ~/.ssh are neither read nor written. Everything ends with the `with`, and with this process however it ends.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from ranks import free_port

ROOT = Path(__file__).parents[2]
INTERFACE = "eth0"  # of every node
KEEP_ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"  # an ssh whose peer is silent ends after 30 to 40 s
_NEEDED = {
    "pdsh": "pdsh", "sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "ip": "iproute2",
    "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "pkill": "procps",
}  # fmt: skip
T = TypeVar("T")
_TOOLS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_ENDS_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
_OWN = ["--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]


def why_not() -> str | None:
    """What this machine lacks to have nodes, in words; None: nothing."""
    packages = {package for tool, package in _NEEDED.items() if _tool(tool) is None}
    if packages:
        return f"several nodes need the Debian packages {' '.join(sorted(packages))}"
    if os.geteuid() != 0:
        return "several nodes need root, for network namespaces and sshd"
    tried = subprocess.run(
        [*_tools("unshare"), *_OWN, "ip", "link", "add", "probe", "type", "bridge"], capture_output=True
    )
    return f"no network namespaces here: {tried.stderr.decode().strip()}" if tried.returncode else None


def require_nodes() -> None:
    """Skip the test where the machine cannot have nodes; fail it under SACL_REQUIRE_NODES=1, as CI sets it."""
    reason = why_not()
    if reason and os.environ.get("SACL_REQUIRE_NODES") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@dataclass
class Running:
    """A command at work on a node."""

    process: subprocess.Popen[bytes]  # nsenter, which waits for the command and ends with its status
    output: Path  # its stdout and stderr

    @property
    def pid(self) -> int:
        """Of the command itself, as this process sees it."""
        return _child(self.process.pid)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Its exit status (negative: the signal that ended it); raises AssertionError where it is still at work."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still at work after {seconds} s:\n{self.text()[-3000:]}") from None

    def wait_for(self, pattern: str, seconds: float) -> re.Match[str]:
        """The first place in its output that the pattern matches; raises AssertionError where there is none in time or
        the command ended without."""

        def found() -> re.Match[str] | None:
            ended = self.process.poll() is not None
            match = re.search(pattern, self.text(), re.MULTILINE)
            assert match or not ended, f"ended without {pattern!r}:\n{self.text()[-3000:]}"
            return match

        return until(found, seconds, lambda: f"no {pattern!r} in {seconds} s:\n{self.text()[-3000:]}")


@dataclass
class Node:
    name: str
    address: str
    init: int  # its first process, an sshd, by the number it has outside
    environment: dict[str, str]  # of commands that are started on it
    folder: Path
    switch: int  # the process that keeps the switch
    port: str  # the switch's end of its cable
    _started: list[Running] = field(default_factory=list)

    def inside(self, *command: str | Path) -> list[str]:
        """The command line that runs `command` on this node, in the repository's root."""
        line = [*_tools("nsenter"), "--target", str(self.init), "--net", "--pid", "--mount", "--uts", "--ipc"]
        return [*line, "env", "-C", str(ROOT), *map(str, command)]

    def start(self, *command: str | Path, env: dict[str, str] | None = None) -> Running:
        """Start a command on this node. env: beside `environment`."""
        output = self.folder / f"{self.name}_{len(self._started):03d}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                self.inside(*command),
                env=self.environment | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._started.append(Running(process, output))
        return self._started[-1]

    def run(
        self, *command: str | Path, env: dict[str, str] | None = None, seconds: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this node to its end; its status, stdout and stderr."""
        merged = self.environment | (env or {})
        return subprocess.run(self.inside(*command), env=merged, capture_output=True, text=True, timeout=seconds)

    def processes(self, containing: str = "") -> list[psutil.Process]:
        """What runs on this node, its sshd among it, whose command line holds these words."""
        own = _namespace(self.init)
        found = []
        for process in psutil.process_iter():
            try:
                if _namespace(process.pid) == own and containing in " ".join(process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):
                continue  # it ended meanwhile
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that DeepSpeed's launcher has started on this node and that are alive; not their workers."""
        found = {}
        for process in self.processes():
            try:
                if "deepspeed.launcher.launch" in psutil.Process(process.ppid()).cmdline():
                    found[int(process.environ()["RANK"])] = process
            except (KeyError, psutil.Error):
                continue
        return found

    def kill_processes(self) -> None:
        """kill -9 of everything on this node but its sshd. The kernel closes the connections: others are told."""
        line = [*_tools("nsenter"), "--target", str(self.init), "--pid", "bash", "-c", "kill -9 -1"]
        subprocess.run(line, stderr=subprocess.DEVNULL)  # it says so where there was nothing

    def cut(self) -> None:
        """Pull its network cable, for good: from now on it and the others hear nothing more of each other."""
        subprocess.run(
            [*_tools("nsenter"), "--target", str(self.switch), "--net", "ip", "link", "set", self.port, "down"]
        )

    def power_off(self) -> None:
        """Pull its plug: every process on it is gone, and none of the others is told."""
        self.cut()
        os.kill(self.init, signal.SIGKILL)  # the kernel ends a namespace with its first process


@dataclass
class Cluster:
    nodes: list[Node]
    folder: Path
    hostfile: Path  # of all nodes
    slots: int

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]

    def hosts(self, *names: str) -> Path:
        """A hostfile of some of the nodes."""
        path = self.folder / f"hosts_{'_'.join(names)}"
        path.write_text("".join(f"{name} slots={self.slots}\n" for name in names))
        return path

    def deepspeed(
        self,
        *arguments: str | Path,
        options: tuple[str | Path, ...] = (),
        hostfile: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> Running:
        """`deepspeed --hostfile ... OPTIONS ARGUMENTS`, started on the first node. hostfile: None for all nodes."""
        launcher = Path(sys.executable).parent / "deepspeed"
        own = ("--hostfile", hostfile or self.hostfile, "--master_port", str(free_port()))
        return self[0].start(launcher, *own, *options, *arguments, env=env)


@contextmanager
def cluster(folder: Path, count: int = 2, slots: int = 1) -> Iterator[Cluster]:
    """Nodes node1, node2, ... with addresses 10.88.0.1, ..., each with `slots` ranks in the hostfile.

    folder: for keys, configuration and outputs; made where it is missing. Skips or fails the test as `require_nodes`.
    """
    require_nodes()
    folder = folder / "cluster"
    folder.mkdir(parents=True)
    names = [f"node{i + 1}" for i in range(count)]
    environment = _environment(folder)
    _write_configuration(folder, names, environment)
    with ExitStack() as stack:
        keeper = [*_tools("unshare"), "--net", "sleep", "infinity"]
        switch = _start(stack, folder / "switch.txt", keeper, environment).pid
        until(lambda: _namespace(switch, "net") != _namespace(os.getpid(), "net"), 10, lambda: "no switch")
        _ip(switch, "link", "add", "switch", "type", "bridge")
        _ip(switch, "link", "set", "switch", "up")
        cores = sorted(os.sched_getaffinity(0))
        nodes = []
        for i, name in enumerate(names):
            log = folder / f"{name}_sshd.txt"
            # a core each, as far as they go: nodes compute with the same number of threads wherever they run
            line = ["taskset", "-c", str(cores[i % len(cores)]), *_tools("unshare"), *_OWN]
            outer = _start(stack, log, [*line, "bash", "-e", str(folder / "boot"), name], environment)
            init = _first_process(outer, log)
            nodes.append(Node(name, _address(i), init, environment, folder, switch, f"port{i + 1}"))
            stack.callback(_end, nodes[-1], outer)
            _connect(nodes[-1])
        for node in nodes:
            _await_answer(nodes[0], node)
        made = Cluster(nodes, folder, folder / "hosts", slots)
        made.hosts(*names).rename(made.hostfile)
        yield made


def until(ask: Callable[[], T | None], seconds: float, complaint: Callable[[], str]) -> T:
    """The first answer that is true; raises AssertionError where there is none in time."""
    end = time.monotonic() + seconds
    while True:
        answer = ask()
        if answer:
            return answer
        assert time.monotonic() < end, complaint()
        time.sleep(0.05)


def _environment(folder: Path) -> dict[str, str]:
    """Of commands on nodes: ours, with the ssh of these nodes, and where DeepSpeed finds what is to travel."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "SSH", "MASTER"))}
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), _TOOLS])
    return kept | {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "DS_ENV_FILE": str(folder / "deepspeed_env"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PDSH_SSH_ARGS_APPEND": KEEP_ALIVE,
    }


def _write_configuration(folder: Path, names: list[str], environment: dict[str, str]) -> None:
    """Keys, and the configuration of ssh, sshd and DeepSpeed's launcher."""
    for key in ("host_key", "user_key"):
        subprocess.run([*_tools("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    host, user = ((folder / f"{key}.pub").read_text() for key in ("host_key", "user_key"))
    addresses = [_address(i) for i in range(len(names))]
    known = ",".join([*names, *addresses])
    travel = {name: environment[name] for name in ("PATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    travel |= {"GLOO_SOCKET_IFNAME": INTERFACE}
    files = {
        "authorized_keys": user,
        "known_hosts": f"{known} {host}",
        "hosts_names": "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(addresses, names, strict=True)),
        "deepspeed_env": "".join(f"{name}={value}\n" for name, value in travel.items()),
        "sshd_config": f"""\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
""",
        "ssh_config": f"""\
IdentityFile {folder}/user_key
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
StrictHostKeyChecking yes
ConnectTimeout 10
LogLevel ERROR
""",
        "boot": f"""\
hostname "$1"
mount -t tmpfs node_run /run
mkdir /run/sshd
mount -t tmpfs node_shm /dev/shm
mount --bind {folder}/hosts_names /etc/hosts
exec {_tool("sshd")} -D -e -f {folder}/sshd_config
""",
        "bin/ssh": f'#!/bin/sh\nexec {_tool("ssh")} -F {folder}/ssh_config "$@"\n',
    }
    (folder / "bin").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "bin/ssh").chmod(0o755)


def _start(
    stack: ExitStack, log: Path, command: list[str], env: os._Environ[str] | dict[str, str]
) -> subprocess.Popen[bytes]:
    """A process that ends with the stack, and with this process."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*_ENDS_WITH_US, *command], env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _first_process(outer: subprocess.Popen[bytes], log: Path) -> int:
    """What unshare has started in the namespaces that it made."""
    return until(lambda: _child(outer.pid, 0), 10, lambda: f"no namespaces: {log.read_text()}")


def _await_answer(asking: Node, node: Node) -> None:
    log = node.folder / f"{node.name}_sshd.txt"
    command = ("ssh", node.name, "true")
    until(lambda: asking.run(*command).returncode == 0, 20, lambda: f"{node.name} is silent:\n{log.read_text()}")


def _end(node: Node, outer: subprocess.Popen[bytes]) -> None:
    """The node first, all of it; then what waits for it and for its commands ends by itself."""
    if outer.poll() is None:
        os.kill(node.init, signal.SIGKILL)
        outer.wait(30)
    for running in node._started:
        running.process.wait(30)


def _connect(node: Node) -> None:
    _ip(node.switch, "link", "add", node.port, "type", "veth", "peer", "name", INTERFACE, "netns", str(node.init))
    _ip(node.switch, "link", "set", node.port, "master", "switch", "up")
    _ip(node.init, "address", "add", f"{node.address}/24", "dev", INTERFACE)
    _ip(node.init, "link", "set", "lo", "up")
    _ip(node.init, "link", "set", INTERFACE, "up")


def _ip(target: int, *arguments: str) -> None:
    """`ip` in the network of a process."""
    subprocess.run([*_tools("nsenter"), "--target", str(target), "--net", *_tools("ip"), *arguments], check=True)


def _address(index: int) -> str:
    return f"10.88.0.{index + 1}"


def _namespace(pid: int, kind: str = "pid") -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def _child(pid: int, otherwise: int | None = None) -> int:
    """The one child of a process; raises AssertionError where it has none and `otherwise` is not given."""
    children = psutil.Process(pid).children()
    if not children and otherwise is not None:
        return otherwise
    assert children, f"process {pid} has no child"
    return children[0].pid


def _tool(name: str) -> str | None:
    return shutil.which(name, path=_TOOLS)


def _tools(name: str) -> list[str]:
    """The tool as the start of a command line."""
    return [_tool(name) or name]
