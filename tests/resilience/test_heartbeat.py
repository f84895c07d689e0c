"""The heartbeat between ranks over real sockets: who is said to be lost, by whom, and that strangers change nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from sacl_ds.faults import heartbeat
from sacl_ds.faults.heartbeat import Address, Heartbeat, HeartbeatClient, HeartbeatServer, Limits

INTERVAL = 0.25  # seconds between beats here
LIMITS = Limits(peer=1.5, step=600)
SOON = 2.5  # seconds in which what the system tells is passed on
SILENCE = LIMITS.peer + 2 * INTERVAL  # seconds after which nothing is to have been said

CLIENT = """
import os, sys
from sacl_ds.faults import heartbeat
from sacl_ds.faults.heartbeat import Heartbeat, Limits
heartbeat.INTERVAL = float(sys.argv.pop())
host, port, token, rank, doing = sys.argv[1:]
now = lambda: Heartbeat(int(rank), "there", os.getpid(), 7, doing, 0.0)
act = lambda said, speaks, mistake: print("verdict", said, flush=True)
client = heartbeat.HeartbeatClient(heartbeat.Address(host, int(port), token), now, Limits(1.5, 600), act, True)
print("ready", flush=True)
for line in sys.stdin:
    client.say(line.strip())
    print("said", flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL", INTERVAL)
    monkeypatch.setattr(heartbeat, "_TOLD", 8 * INTERVAL)


@dataclass
class Place:
    """A rank of this process: what it does, and what its heartbeat made it do."""

    rank: int
    doing: str = "step"
    acted: list[tuple[str, bool]] = field(default_factory=list)
    mistake: bool | None = None
    when: threading.Event = field(default_factory=threading.Event)

    def now(self) -> Heartbeat:
        return Heartbeat(self.rank, f"node{self.rank}", 4000 + self.rank, 7, self.doing, 0.0)

    def act(self, said: str, speaks: bool, mistake: bool) -> None:
        self.mistake = mistake
        self.acted.append((said, speaks))
        self.when.set()

    def told(self, seconds: float) -> tuple[str, bool]:
        """What it was made to do, once it was."""
        assert self.when.wait(seconds), f"rank {self.rank} was told nothing in {seconds} s"
        (acted,) = self.acted
        return acted


@dataclass
class Job:
    """A server and clients, in this process."""

    first: Place
    server: HeartbeatServer
    others: list[Place]
    clients: list[HeartbeatClient]

    @property
    def address(self) -> Address:
        return self.server.address

    def verdicts(self, seconds: float) -> list[tuple[str, bool]]:
        """What any rank was made to do, so many seconds from now."""
        time.sleep(seconds)
        return [acted for place in (self.first, *self.others) for acted in place.acted]


@pytest.fixture
def job() -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(count: int, world: int | None = None, limits: Limits = LIMITS) -> Job:
        first = Place(0)
        server = HeartbeatServer("127.0.0.1", first.now, limits, first.act, world or count + 1)
        others = [Place(number) for number in range(1, count + 1)]
        clients = [HeartbeatClient(server.address, p.now, limits, p.act, speaks=p.rank == 1) for p in others]
        made.append(Job(first, server, others, clients))
        return made[-1]

    yield make
    for each in made:
        for client in each.clients:
            client.close()
        each.server.close()


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A client in a process of its own, which does as it is told over its stdin."""
    started: list[subprocess.Popen[str]] = []

    def start(address: Address, rank: int, doing: str = "step") -> subprocess.Popen[str]:
        line = [sys.executable, "-c", CLIENT, address.host, str(address.port), address.token, str(rank), doing]
        line.append(str(INTERVAL))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        child = subprocess.Popen(line, **pipes)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def beaten(server: HeartbeatServer, rank: int) -> None:
    """Wait until the server has heard that rank."""
    until = time.monotonic() + 10
    while rank not in server._heard:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_all_is_well(job: Callable[..., Job]) -> None:
    assert job(3).verdicts(SILENCE) == []


def test_a_process_that_is_killed(job: Callable[..., Job], process: Callable[..., subprocess.Popen[str]]) -> None:
    """The server says it, and once; the others are told the same and are silent."""
    made = job(2, world=4)
    child = process(made.address, 3)
    beaten(made.server, 3)
    child.kill()
    said, speaks = made.first.told(SOON)
    assert speaks
    assert said.startswith(f"rank 3 on there (process {child.pid}) ended without a word, computing, step 8: ")
    for place in made.others:
        assert place.told(1) == (said, False)


def test_last_words(job: Callable[..., Job], process: Callable[..., subprocess.Popen[str]]) -> None:
    made = job(1, world=3)
    child = process(made.address, 2)
    child.communicate("the disk is full\n")
    said, speaks = made.first.told(SOON)
    assert (said, speaks) == (f"rank 2 on there (process {child.pid}) failed: the disk is full", True)
    assert made.others[0].told(1) == (said, False)
    assert made.first.mistake is False


@pytest.mark.parametrize("number", [0, 1])
def test_a_mistake_of_one_is_a_mistake_of_all(number: int, job: Callable[..., Job]) -> None:
    """No rank is started anew for what no restart mends, whichever met it."""
    made = job(3)
    for rank in (1, 2, 3):
        beaten(made.server, rank)
    (made.server, *made.clients)[number].say("no such file", True)
    for place in [made.first, *made.others]:
        if place.rank != number:
            assert place.told(SOON)[0].endswith("failed: no such file")
            assert place.mistake is True


def test_a_verdict_that_is_reached_while_a_beat_is_answered(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes with the next beat: the connection stays."""
    made, name = job(1), socket.gethostname()
    beaten(made.server, 1)

    def host() -> str:
        made.server._said = "rank 0 failed: no such file"
        return name

    monkeypatch.setattr(socket, "gethostname", host)
    assert made.others[0].told(SOON + 1)[0] == "rank 0 failed: no such file"


def test_a_process_that_stands_still(job: Callable[..., Job], process: Callable[..., subprocess.Popen[str]]) -> None:
    """And the others are told though it fetches no verdict."""
    made = job(1, world=3)
    child = process(made.address, 2, "data")
    beaten(made.server, 2)
    os.kill(child.pid, signal.SIGSTOP)
    begun = time.monotonic()
    said, _ = made.first.told(LIMITS.peer + 5)
    assert time.monotonic() - begun > LIMITS.peer - INTERVAL
    assert said.startswith(f"rank 2 on there (process {child.pid}) has not been heard of for ")
    assert "last waiting for data, step 8" in said
    assert made.others[0].told(1) == (said, False)


def test_a_rank_that_never_comes(job: Callable[..., Job]) -> None:
    made = job(1, world=4)
    said, speaks = made.first.told(LIMITS.peer + 2)
    assert speaks
    assert said.startswith("rank 2 and 1 more have not come in ")
    assert made.others[0].told(2) == (said, False)


def test_the_first_rank_fails_by_itself(job: Callable[..., Job]) -> None:
    """It says so itself, so its heartbeat does nothing; nobody else says it."""
    made = job(3)
    made.server.say("rank 0 cannot write")
    for place in made.others:
        assert place.told(1) == ("rank 0 on node0 (process 4000) failed: rank 0 cannot write", False)
    assert made.first.acted == []


@pytest.mark.parametrize("order", ["first ahead", pytest.param("first last", marks=pytest.mark.slow)])
def test_all_fail_alike(order: str, job: Callable[..., Job], process: Callable[..., subprocess.Popen[str]]) -> None:
    """For a reason that each knows: no rank takes another's end for a loss, whichever comes to its own end first."""
    made = job(2, world=4)
    child = process(made.address, 3)
    beaten(made.server, 3)
    ends: list[Callable[[], None]] = [made.server.silence, *(w.silence for w in made.clients)]
    for end in ends if order == "first ahead" else reversed(ends):
        end()
    if order == "first ahead":  # the one that is slow to end was told that the first one's end means nothing
        out, _ = child.communicate("\n", timeout=10)
        assert out == "said\n"
    assert made.verdicts(SILENCE) == []


def test_the_end_of_a_run_takes_its_time(job: Callable[..., Job]) -> None:
    """Clients have said that they end, and the first one is slow: nobody is missed, and the end is silent."""
    made = job(3)
    for client in made.clients:
        client.close()
    assert made.verdicts(SILENCE) == []
    made.server.close()
    assert made.verdicts(2 * INTERVAL) == []


SERVER = """
import os, sys, time
from sacl_ds.faults import heartbeat
from sacl_ds.faults.heartbeat import Heartbeat, Limits
heartbeat.INTERVAL = float(sys.argv[1])
message = Heartbeat(0, "here", os.getpid(), 7, "step", 0.0)
server = heartbeat.HeartbeatServer("127.0.0.1", lambda: message, Limits(1.5, 600), print, 3)
print(server.address.port, server.address.token, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_first_rank_is_lost(number: signal.Signals) -> None:
    """All others end by themselves, and those say it that were asked to."""
    child = subprocess.Popen([sys.executable, "-c", SERVER, str(INTERVAL)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        port, token = child.stdout.readline().split()
        places = [Place(1), Place(2)]
        for place in places:
            address = Address("127.0.0.1", int(port), token)
            HeartbeatClient(address, place.now, LIMITS, place.act, speaks=place.rank == 1)
        time.sleep(3 * INTERVAL)
        child.send_signal(number)
        for place in places:
            said, speaks = place.told(SOON if number == signal.SIGKILL else LIMITS.peer + 3)
            assert speaks == (place.rank == 1)
            assert said.startswith("rank 0 on ")
            assert ("ended without a word" if number == signal.SIGKILL else "has not been heard of for") in said
    finally:
        child.kill()
        child.communicate()


def test_a_first_rank_that_is_not_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = Place(1)
        address = Address("127.0.0.1", closed.getsockname()[1], "x")
        with pytest.raises(OSError, match="refused"):
            HeartbeatClient(address, place.now, LIMITS, place.act, speaks=True)


def line_of(token: object, beat: object, words: object) -> bytes:
    return json.dumps({"token": token, "beat": beat, "words": words}).encode() + b"\n"


BEAT = {"rank": 1, "host": "stranger", "process": 1, "step": 0, "doing": "step", "seconds": 1e9}
STRANGE = {
    "nothing": b"",
    "an end of line": b"\n" * 1000,
    "a browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no text": bytes(range(256)) * 300,
    "megabytes without an end of line": b"x" * (4 << 20),
    "deep": b"[" * 60000 + b"\n",
    "no object": b"[1]\n",
    "a great number": b'{"token": ' + b"9" * 60000 + b"}\n",
    "another token": line_of("guessed", BEAT, "I have failed"),
    "no token": line_of(None, BEAT, "I have failed"),
}


@pytest.mark.parametrize("sent", STRANGE.values(), ids=STRANGE.keys())
def test_strangers_change_nothing(sent: bytes, job: Callable[..., Job]) -> None:
    made = job(1)
    beaten(made.server, 1)
    for leave in (True, False):
        with socket.create_connection((made.address.host, made.address.port), timeout=5) as stranger:
            try:
                stranger.sendall(sent)
                if leave:
                    continue
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(100) == b""
            except (BrokenPipeError, ConnectionResetError):
                pass  # the server has hung up
    assert made.verdicts(2 * INTERVAL) == []
    assert set(made.server._heard) == {1}
    made.clients[0].say("heard all the same")
    assert made.first.told(SOON)[0].endswith("failed: heard all the same")


def test_a_crowd_of_strangers(job: Callable[..., Job]) -> None:
    """Hundreds that connect and say nothing do not keep ranks from being heard."""
    made = job(2)
    crowd = [socket.create_connection((made.address.host, made.address.port), timeout=5) for _ in range(300)]
    try:
        assert made.verdicts(SILENCE) == []
    finally:
        for each in crowd:
            each.close()
    assert made.verdicts(2 * INTERVAL) == []
