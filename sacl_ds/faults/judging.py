"""Decide which rank is at fault from the ranks' last heartbeats. Pure: no clocks, no sockets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
