"""Heartbeats: every second each rank tells the first one what it does; the first one judges, and answers.

Over sockets of its own, apart from the collectives: these hang when a rank is lost, wait half an hour before they say
so, and then do not say who it was.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

_ORDER = {"data": 0, "step": 1}  # within a step


@dataclass(frozen=True)
class Heartbeat:
    """Heartbeat of a rank. doing: starting, data, step, evaluation, saving or ending; seconds: for how long."""

    rank: int
    host: str
    process: int
    step: int
    doing: str
    seconds: float

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"

    @property
    def where(self) -> str:
        words = {"data": "waiting for data", "step": "computing", "saving": "saving", "evaluation": "evaluating"}
        return f"{words.get(self.doing, self.doing)}, step {self.step + 1}"


@dataclass(frozen=True)
class Heard:
    """Last heartbeat of a rank. ago: seconds since `beat` came. gone: whether its connection is closed. words: its last
    ones; "" of a regular end, None where it said none."""

    beat: Heartbeat
    ago: float = 0.0
    gone: bool = False
    words: str | None = None


@dataclass(frozen=True)
class Limits:
    """Limits in seconds. peer: without a word of a rank; step: of computing a step, or waiting for its data."""

    peer: float
    step: float


def verdict(heard: Mapping[int, Heard], limits: Limits) -> str | None:
    """Return one line that names the cause and the rank, or None where all is well."""
    ranks = [heard[number] for number in sorted(heard)]
    for each in ranks:
        if each.words:
            return f"{each.beat} failed: {each.words}"
    for each in ranks:
        if each.gone and each.words is None:
            return (
                f"{each.beat} ended without a word, {each.beat.where}: it was killed, or the system ended it for "
                "want of memory (dmesg tells)"
            )
    ranks = [each for each in ranks if not each.gone and each.words is None]  # the others have ended as they should
    for each in ranks:
        if each.ago > limits.peer:
            return (
                f"{each.beat} has not been heard of for {each.ago:.0f} s, last {each.beat.where}: its network is cut, "
                "or it stands still"
            )
    return _hang([each.beat for each in ranks], limits)


def _hang(beats: list[Heartbeat], limits: Limits) -> str | None:
    """Return the line that names the ranks at fault for a hang: those behind the others, who wait for them in a step.

    None where they are behind by what may take as long as it takes: an evaluation, a checkpoint, a start.
    """
    within = [beat for beat in beats if beat.doing in _ORDER]
    slow = [beat for beat in within if beat.seconds > limits.step]
    if not slow:
        return None
    behind = min((beat.step, _ORDER[beat.doing]) for beat in within)
    if any((beat.step, _ORDER["data"]) <= behind for beat in beats if beat.doing not in _ORDER):
        return None
    last = [beat for beat in within if (beat.step, _ORDER[beat.doing]) == behind]
    seconds = max(beat.seconds for beat in slow)
    if len(last) == len(within) > 1:
        common = replace(last[0], seconds=seconds)
        return f"all {len(last)} ranks have been {common.where}, for {seconds:.0f} s: none can go on"
    also = f", and {len(last) - 1} more" if len(last) > 1 else ""
    rest = "; the others wait" if len(within) > len(last) else ""
    return f"{last[0]}{also} has been {last[0].where}, for {seconds:.0f} s: it does not go on{rest}"


INTERVAL = 1.0  # seconds between beats
_TOLD = 3.0  # seconds that the first rank waits for the others to fetch its verdict
_LONGEST = 1 << 16  # bytes of a line
_ALIKE = ""  # the verdict where all ranks end for one reason, of which each knows

Now = Callable[[], Heartbeat]
Act = Callable[[str, bool, bool], None]  # on a verdict: whether this rank is to say it, and whether it is a mistake


@dataclass(frozen=True)
class Address:
    """Address at which rank 0 listens; `token` tells its own ranks from whoever else connects."""

    host: str
    port: int
    token: str


class Watch:
    """Notices that this process stood still: it looks at the clock about once an INTERVAL while it runs."""

    def __init__(self, limits: Limits) -> None:
        self.stood_still = False
        self._last, self._most = time.monotonic(), INTERVAL + limits.peer / 2

    def look(self) -> None:
        now = time.monotonic()
        self.stood_still |= now - self._last > self._most
        self._last = now


class HeartbeatServer:
    """Heartbeat server, on the first rank: hears all others, and itself."""

    def __init__(self, host: str, now: Now, limits: Limits, act: Act, world: int) -> None:
        """Listen. host: by which the others reach this machine; world: number of ranks, this one among them."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
        self.address = Address(host, self._listener.getsockname()[1], secrets.token_hex(16))
        self._now, self._limits, self._act = now, limits, act
        self._missing, self._since = set(range(world)) - {now().rank}, time.monotonic()
        self._heard: dict[int, Heard] = {}
        self._at: dict[int, float] = {}  # when each rank was heard
        self._mistaken: set[int | None] = set()  # ranks whose last words are of a mistake
        self._said: str | None = None
        self._mistake = False  # of the user, by the first last words: no rank is to be started anew
        self._alone = False  # this rank ends by itself
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._closed = threading.Event()
        self.watch = Watch(limits)
        self._wakes, self._woken = socket.socketpair()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def say(self, words: str, mistake: bool = False) -> None:
        """Report that this rank fails by itself, with these last words; returns when all others are told."""
        own = self._now()
        with self._lock:
            self._alone = True
            self._mistake = mistake if not self._said else self._mistake
            self._said = self._said or f"{own} failed: {words}"
        self._await_end()

    def silence(self) -> None:
        """Report that all ranks end alike, for a reason reported elsewhere; returns when all others are told."""
        with self._lock:
            self._alone = True
            self._said = self._said or _ALIKE
        self._await_end()

    def close(self) -> None:
        """Stop after a regular end of the run, once the other ranks have ended."""
        self._ending.set()
        self._await_end()

    def _await_end(self) -> None:
        with suppress(OSError):  # it has ended
            self._wakes.send(b".")
        self._closed.wait(_TOLD + 1)

    def _run(self) -> None:
        try:
            self._hear_all()
        finally:
            self._closed.set()
        if self._said is not None and not self._ending.is_set() and not self._alone:
            self._act(self._said, True, self._mistake)

    def _hear_all(self) -> None:
        """Serve until the run ends, or all ranks have fetched a verdict."""
        selector = selectors.DefaultSelector()
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        lines: dict[socket.socket, bytes] = {}
        owners: dict[socket.socket, int] = {}
        told: float | None = None
        while not self._ending.is_set():
            for key, _ in selector.select(INTERVAL / 4):
                if key.fileobj is self._listener:
                    _accept(self._listener, selector, lines)
                elif key.fileobj is self._woken:
                    self._woken.recv(_LONGEST)
                elif isinstance(key.fileobj, socket.socket):
                    self._receive(key.fileobj, selector, lines, owners)
            self.watch.look()
            if told is None and (said := self._judgement()) is not None:
                told = time.monotonic()
                with self._lock:
                    if self._said is None:
                        blamed = next((rank for rank in sorted(self._heard) if self._heard[rank].words), None)
                        self._said, self._mistake = said, blamed in self._mistaken
            waiting = [rank for rank in owners.values() if self._heard[rank].words is None]
            if told is not None and (not waiting or time.monotonic() - told > _TOLD):
                break
        for peer in [*lines, self._listener, self._woken]:
            peer.close()
        selector.close()

    def _judgement(self) -> str | None:
        """Return the verdict that stands or is reached now, by heartbeats or for ranks that never came; else None."""
        with self._lock:
            if self._said is not None:
                return self._said
        now, own = time.monotonic(), self._now()
        known = {
            rank: Heard(heard.beat, now - self._at[rank], heard.gone, heard.words)
            for rank, heard in self._heard.items()
        }
        said = verdict({own.rank: Heard(own), **known}, self._limits)
        if said is None and self._missing and now - self._since > self._limits.peer:
            first, more = min(self._missing), len(self._missing) - 1
            also = f" and {more} more have" if more else " has"
            return f"rank {first}{also} not come in {now - self._since:.0f} s: its start has failed, or its network"
        return said

    def _receive(
        self,
        peer: socket.socket,
        selector: selectors.BaseSelector,
        lines: dict[socket.socket, bytes],
        owners: dict[socket.socket, int],
    ) -> None:
        try:
            data = peer.recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        lines[peer] += data
        *whole, lines[peer] = lines[peer].split(b"\n")
        alive = bool(data) and len(lines[peer]) < _LONGEST
        for line in whole:
            alive = self._hear(peer, line, owners) and alive
        if not alive:
            selector.unregister(peer)
            peer.close()
            del lines[peer]
            if (rank := owners.pop(peer, None)) is not None:
                last = self._heard[rank]
                self._heard[rank] = Heard(last.beat, 0.0, True, last.words)

    def _hear(self, peer: socket.socket, line: bytes, owners: dict[socket.socket, int]) -> bool:
        """Handle a message; returns whether the peer is to be heard further."""
        try:
            said = json.loads(line)
            if said["token"] != self.address.token:
                return False
            beat, words, mistake = Heartbeat(**said["beat"]), said["words"], said["mistake"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return False
        owners[peer] = beat.rank
        self._missing.discard(beat.rank)
        if mistake:
            self._mistaken.add(beat.rank)
        self._heard[beat.rank], self._at[beat.rank] = Heard(beat, words=words), time.monotonic()
        with self._lock:  # a verdict that is reached from here on is fetched with the next beat
            verdict, mistake = self._said, self._mistake
        answer = {"verdict": verdict, "mistake": mistake, "host": socket.gethostname()}
        try:
            peer.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            return False
        return verdict is None


class HeartbeatClient:
    """Heartbeat client, on every other rank."""

    def __init__(self, address: Address, now: Now, limits: Limits, act: Act, speaks: bool) -> None:
        """Connect. speaks: whether this rank reports the loss of the first one. Raises OSError where that cannot be
        reached."""
        self._address, self._now, self._limits, self._act, self._speaks = address, now, limits, act, speaks
        self._socket = socket.create_connection((address.host, address.port), timeout=limits.peer)
        self._socket.settimeout(INTERVAL)
        self._lock = threading.Lock()
        self._silent = False
        self.watch = Watch(limits)
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def say(self, words: str, mistake: bool = False) -> None:
        """Send this rank's last words, "" for a regular end. From now on it hears no verdict."""
        self._silent = True
        with self._lock:
            try:
                self._send(words, mistake)
                self._answer(time.monotonic() + INTERVAL)
            except OSError:
                pass

    def silence(self) -> None:
        """Report that all ranks end alike, for a reason that is reported elsewhere."""
        self.say("")

    def close(self) -> None:
        """Report a regular end."""
        self.say("")

    def outlast(self, seconds: float) -> None:
        """After last words: return when the first rank's part has ended, or so many seconds later."""
        self._socket.settimeout(seconds)
        with suppress(OSError):
            while self._socket.recv(_LONGEST):
                pass

    def _send(self, words: str | None, mistake: bool = False) -> None:
        said = {"token": self._address.token, "beat": asdict(self._now()), "words": words, "mistake": mistake}
        line = json.dumps(said)
        self._socket.sendall(line.encode() + b"\n")

    def _answer(self, until: float) -> dict[str, Any]:
        """Raises ConnectionError where the first rank has closed, TimeoutError where it is silent."""
        line = b""
        while not line.endswith(b"\n"):
            try:
                part = self._socket.recv(_LONGEST)
            except TimeoutError:
                self.watch.look()
                if time.monotonic() > until:
                    raise
                continue
            self.watch.look()
            if not part:
                raise ConnectionResetError
            line += part
        return json.loads(line)

    def _run(self) -> None:
        host = self._address.host
        while not self._silent:
            self.watch.look()
            begun = time.monotonic()
            try:
                with self._lock:
                    if self._silent:
                        break
                    self._send(None)
                    answer = self._answer(begun + self._limits.peer)
                host = answer["host"] or host
                if answer["verdict"] == _ALIKE:
                    self._silent = True
                elif answer["verdict"] is not None:
                    self._end(answer["verdict"], False, answer["mistake"])
                    break
            except TimeoutError:
                silent = f"has not been heard of for {time.monotonic() - begun:.0f} s"
                self._end(f"rank 0 on {host} {silent}: its network or ours is cut, or it stands still", self._speaks)
                break
            except OSError:
                killed = "it was killed, or the system ended it for want of memory (dmesg tells)"
                self._end(f"rank 0 on {host} ended without a word: {killed}", self._speaks)
                break
            time.sleep(max(0.0, INTERVAL - (time.monotonic() - begun)))

    def _end(self, said: str, speaks: bool, mistake: bool = False) -> None:
        if not self._silent:
            self._act(said, speaks, mistake)


def _accept(listener: socket.socket, selector: selectors.BaseSelector, lines: dict[socket.socket, bytes]) -> None:
    try:
        peer, _ = listener.accept()
    except OSError:
        return
    peer.settimeout(INTERVAL)  # a reader that stands still must not stop this one
    selector.register(peer, selectors.EVENT_READ)
    lines[peer] = b""
