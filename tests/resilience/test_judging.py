"""Which rank is at fault, from what all were last heard to say."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from sacl_ds.faults.heartbeat import Heard, Heartbeat, Limits, verdict
from sacl_ds.faults.restarts import Status, may_follow

LIMITS = Limits(peer=60, step=600)
DOINGS = ("starting", "data", "step", "evaluation", "saving", "ending")


@st.composite
def ranks(draw: st.DrawFn, words: bool = True, gone: bool = True, late: bool = True) -> dict[int, Heard]:
    """What ranks of one run may be heard to say. words, gone, late: whether some may have ended, or fallen silent."""
    found = {}
    for number in draw(st.lists(st.integers(0, 50), min_size=1, max_size=6, unique=True)):
        doing, step = draw(st.sampled_from(DOINGS)), draw(st.integers(10, 13))
        beat = Heartbeat(number, f"node{number // 8}", 4000 + number, step, doing, draw(st.floats(0, 2000)))
        found[number] = Heard(
            beat,
            ago=draw(st.floats(0, 200)) if late else 0.0,
            gone=gone and draw(st.booleans()),
            words=draw(st.sampled_from([None, None, "", "the disk is full"])) if words else None,
        )
    return found


def place(beat: Heartbeat) -> tuple[int, int]:
    """How far a rank has come; what lies between two steps comes ahead of the wait for the later one's data."""
    return beat.step, {"data": 1, "step": 2}.get(beat.doing, 0)


def named(said: str) -> int:
    """The rank at fault."""
    found = re.match(r"rank (\d+) on node\d+ \(process (\d+)\)", said)
    assert found, said
    assert int(found[2]) == 4000 + int(found[1])
    return int(found[1])


def as_it_should(heard: Heard) -> bool:
    return heard.words == ""


@settings(max_examples=500)
@given(ranks())
def test_the_rank_that_is_named_is_at_fault(heard: dict[int, Heard]) -> None:
    """Last words ahead of all else, then an end without any, then silence, then a step that does not end; the first of
    equals; and never one that ended as it should."""
    failed = [n for n in sorted(heard) if heard[n].words]
    dead = [n for n in sorted(heard) if heard[n].gone and heard[n].words is None]
    alive = [n for n in sorted(heard) if not heard[n].gone and heard[n].words is None]
    silent = [n for n in alive if heard[n].ago > LIMITS.peer]
    said = verdict(heard, LIMITS)
    expected = (failed + dead + silent)[:1]
    if expected:
        assert said is not None
        assert named(said) == expected[0]
        at_fault = heard[expected[0]]
        words = f"failed: {at_fault.words}" if failed else "ended without a word" if dead else "has not been heard of"
        assert words in said
    elif said is not None and not said.startswith("all "):
        at_fault = heard[named(said)]
        assert not as_it_should(at_fault)
        assert all(place(at_fault.beat) <= place(heard[n].beat) for n in alive)


@settings(max_examples=500)
@given(ranks(words=False, gone=False, late=False))
def test_a_step_that_does_not_end(heard: dict[int, Heard]) -> None:
    """Said if and only if some rank has been within a step for too long, and none of those that it may wait for does
    what has no limit; at fault is the one that is furthest behind."""
    beats = [heard[number].beat for number in sorted(heard)]
    too_long = any(beat.doing in ("data", "step") and beat.seconds > LIMITS.step for beat in beats)
    least = min(map(place, beats))
    hindmost = [beat for beat in beats if place(beat) == least]
    within = {beat.rank for beat in beats if beat.doing in ("data", "step")}
    unlimited = [
        b for b in beats if b.rank not in within and all(place(b) < place(o) for o in beats if o.rank in within)
    ]
    said = verdict(heard, LIMITS)
    assert (said is not None) == (too_long and not unlimited)
    if said is None:
        return
    if len(hindmost) == len(within) > 1:
        assert said.startswith(f"all {len(within)} ranks have been ")
    else:
        assert named(said) == hindmost[0].rank
        assert ("and " in said.split(" has been ")[0]) == (len(hindmost) > 1)
        assert said.endswith("; the others wait") == (len(within) > len(hindmost))
    assert f"step {least[0] + 1}, for " in said


@settings(max_examples=200)
@given(ranks(), st.floats(1, 1e4), st.floats(1, 1e4))
def test_longer_limits_accuse_no_more(heard: dict[int, Heard], peer: float, step: float) -> None:
    if verdict(heard, Limits(peer, step)) is None:
        assert verdict(heard, Limits(2 * peer, 3 * step)) is None


@settings(max_examples=200)
@given(ranks())
def test_the_order_of_ranks_does_not_matter(heard: dict[int, Heard]) -> None:
    assert verdict(dict(reversed(heard.items())), LIMITS) == verdict(heard, LIMITS)


def test_a_rank_that_waits_for_the_end_of_the_first_is_not_missed() -> None:
    """It has said that it ends, and says no more, while the first one draws its plots for minutes."""
    beats = [Heartbeat(number, "node0", 4000 + number, 20, "ending", 500.0) for number in (0, 1)]
    assert verdict({0: Heard(beats[0]), 1: Heard(beats[1], ago=500.0, words="")}, LIMITS) is None
    assert verdict({0: Heard(beats[0]), 1: Heard(beats[1], ago=500.0)}, LIMITS) is not None


def test_the_first_cause_of_a_start_stands() -> None:
    running, failed = (Status(state, 4, 2, start="a") for state in ("running", "failed"))
    assert may_follow(None, "a")
    assert may_follow(running, "a")
    assert not may_follow(failed, "a")
    assert not may_follow(running, "b")  # of a rank that was left over when the run was started anew
    assert not may_follow(failed, "b")
