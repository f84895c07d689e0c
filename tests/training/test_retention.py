"""Which checkpoints stay, by an independent definition."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from sacl_ds.training.checkpoint_folder import Retention


@dataclass(frozen=True)
class Saved:
    step: int
    figures: dict[str, float] = field(default_factory=dict)


FIGURES = st.dictionaries(st.sampled_from(["R@1", "mAP"]), st.floats(allow_infinity=True, allow_nan=True))
SAVED = st.lists(st.builds(Saved, st.integers(0, 200), FIGURES), max_size=12, unique_by=lambda each: each.step)
NUMBER = st.none() | st.integers(1, 15)
KEEPS = st.builds(Retention, NUMBER, NUMBER, st.none() | st.sampled_from(["R@1", "loss"]))


@settings(max_examples=500)
@given(SAVED, KEEPS)
def test_which_checkpoints_stay(saved: list[Saved], keep: Retention) -> None:
    """One by one: it stays if fewer than n are newer, or at a multiple, or where none has a better figure, nor an equal
    one earlier; a figure that is no number is none."""

    def judged(each: Saved) -> bool:
        return keep.best in each.figures and each.figures[keep.best] == each.figures[keep.best]

    def stays(each: Saved) -> bool:
        newer = sum(other.step > each.step for other in saved)
        better = [
            other
            for other in filter(judged, saved)
            if judged(each) and (other.figures[keep.best], -other.step) > (each.figures[keep.best], -each.step)  # type: ignore[index]
        ]
        return (
            keep.newest is None
            or newer < keep.newest
            or (keep.every is not None and each.step % keep.every == 0)
            or (judged(each) and not better)
        )

    assert keep.superseded([*saved]) == {each.step for each in saved if not stays(each)}
    if saved:
        assert max(each.step for each in saved) not in keep.superseded([*saved])


@settings(max_examples=300)
@given(SAVED, KEEPS, st.integers(1, 10))
def test_what_goes_is_gone_for_good(saved: list[Saved], keep: Retention, more: int) -> None:
    """Asked again it names none of those that stayed; and none goes that a longer memory would not let go."""
    gone = keep.superseded([*saved])
    assert keep.superseded([each for each in saved if each.step not in gone]) == set()
    longer = Retention(keep.newest and keep.newest + more, keep.every, keep.best)
    assert longer.superseded([*saved]) <= gone
