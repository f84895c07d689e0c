"""Cautions on a sharpness that is too large: said for what was seen to go wrong, not for what went well."""

from pathlib import Path

import pytest
from starting import start

from sacl_ds.config_file import load_config
from sacl_ds.telemetry.records import read
from sacl_ds.training.health import Cautions


def cautions(*loss: str, steps: int = 1000) -> Cautions:
    return Cautions(load_config(None, [f"train.steps={steps}", *(f"loss.{setting}" for setting in loss)]))


def rows(effective_share: float, mass: float, shape: float) -> list[dict[str, float]]:
    """Both directions of a record, a little apart."""
    return [{"effective_share": effective_share + by, "mass": mass + by, "shape": shape} for by in (0.01, -0.01)]


COLLAPSED, PAST_THE_BEST, NEAR_THE_BEST = rows(0.16, -7.8, 1.5), rows(0.13, -4.0, 3.1), rows(0.29, -1.5, 0.82)
FLAT_THEN_STEEP = rows(0.93, -0.2, 0.05)


@pytest.mark.parametrize(
    ("loss", "alpha", "scale", "said"),
    [
        (["sharpness=12"], 0.0, 18.0, True),
        (["sharpness=20"], 0.5, 25.0, True),
        (["sharpness=3"], 0.0, 14.3, False),
        (["sharpness=12"], 0.0, 25.0, False),
        (["sharpness=12"], 1.0, 18.0, False),  # the frozen teacher alone
        (["sharpness=12"], 0.95, 18.0, False),
        (["sharpness=12", "contrastive=infonce"], 0.0, 18.0, False),
        (["sharpness=0", "teacher_sharpness=60"], 1e-9, 18.0, False),
        (["sharpness=10", "teacher_sharpness=60"], 0.5, 18.0, False),  # the teacher's term is all but everything
    ],
)
def test_a_sharpness_over_half_of_the_scale(loss: list[str], alpha: float, scale: float, said: bool) -> None:
    line = cautions(*loss).of_scale(500, alpha, scale)
    assert (line is not None) == said
    if line:
        assert line.startswith(f"loss.{loss[0]} is over half of the logit scale ({scale:.1f} at step 500)")
        assert f"take loss.sharpness={scale / 2:.2g} or less" in line


@pytest.mark.parametrize(
    ("loss", "alpha", "record", "said"),
    [
        (["sharpness=12"], 0.0, COLLAPSED, True),
        (["sharpness=20"], 0.5, PAST_THE_BEST, True),
        (["sharpness=6"], 0.0, NEAR_THE_BEST, False),
        (["sharpness=6"], 0.5, NEAR_THE_BEST, False),
        (["sharpness=20"], 1.0, PAST_THE_BEST, False),
        (["sharpness=0", "teacher_sharpness=60"], 1e-9, FLAT_THEN_STEEP, False),
        (["sharpness=0", "teacher_sharpness=60"], 1e-9, COLLAPSED, False),
        (["contrastive=infonce"], 0.0, rows(1.0, 0.0, 0.0), False),
        (["sharpness=12"], 0.0, rows(float("nan"), float("nan"), float("nan")), False),  # no negatives at all
    ],
)
def test_weights_as_of_a_collapse(loss: list[str], alpha: float, record: list, said: bool) -> None:
    line = cautions(*loss).of_weights(500, alpha, record)
    assert (line is not None) == said
    if line:
        share = round(100 * record[0]["effective_share"] - 1)
        assert f"at step 500 the effective number of negatives is {share}% of all" in line
        assert f"take a lower loss.sharpness (now {loss[0].removeprefix('sharpness=')})" in line


def test_an_untrained_model_is_not_judged() -> None:
    """At the start the scale is still to rise, and similarities are still random; but beyond the scale is beyond."""
    some = cautions("sharpness=7.2")
    assert some.of_scale(1, 0.0, 14.3) is None
    assert some.of_scale(100, 0.0, 14.3) is None
    assert some.of_weights(1, 0.0, COLLAPSED) is None
    assert some.of_weights(100, 0.0, COLLAPSED) is None
    assert some.of_scale(101, 0.0, 14.3)
    assert some.of_weights(101, 0.0, COLLAPSED)
    assert cautions("sharpness=15").of_scale(1, 0.0, 14.3)
    short = cautions("sharpness=7.2", steps=20)  # shorter than its warm-up
    assert short.of_weights(10, 0.0, COLLAPSED) is None
    assert short.of_weights(20, 0.0, COLLAPSED)


def test_each_is_said_once() -> None:
    some = cautions("sharpness=12")
    assert [some.of_scale(step, 0.0, 18.0) is not None for step in (500, 600)] == [True, False]
    assert [some.of_weights(step, 0.0, COLLAPSED) is not None for step in (500, 600)] == [True, False]


def test_in_a_run_they_are_printed_and_logged(tmp_path: Path) -> None:
    """On two ranks, once. So sharp that the weights of whatever this model sees are steep."""
    settings = ["teacher.steps=0", "loss.sharpness=60", "loss.matching_weight=0", "loss.mlm_weight=0"]
    done = start(tmp_path / "run", *settings, "optim.warmup_steps=1", "records.every=5", ranks=2)
    printed = [line.removeprefix("warning: ") for line in done.stdout.splitlines() if line.startswith("warning: ")]
    logged = [line for line in read(tmp_path / "run/metrics.jsonl") if "caution" in line]
    assert [line["caution"] for line in logged] == printed
    assert [line["step"] for line in logged] == [1, 5]
    assert "loss.sharpness=60 is over half of the logit scale (14.3 at step 1)" in printed[0]
    assert "weights as of too large a sharpness: at step 5 " in printed[1]


def test_a_healthy_run_hears_nothing(tmp_path: Path) -> None:
    done = start(tmp_path / "run", "optim.warmup_steps=1", "records.every=5")
    assert "warning" not in done.stdout
    assert not [line for line in read(tmp_path / "run/metrics.jsonl") if "caution" in line]
