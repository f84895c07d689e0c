"""Whole runs in micro-batches: the same data, losses, records and queue as without them."""

from pathlib import Path

import pytest
from starting import start

from sacl_ds.telemetry.records import read, read_figures

# without ITM, whose negatives come from the micro-batch, and without anything drawn anew for other shapes
SAME = ["loss.matching_weight=0", "model.dropout=0", "train.steps=6", "records.every=2", "data.scenes.count=64",
        "momentum.enabled=true", "momentum.queue_size=40"]  # fmt: skip
TIMED = ("second", "memory", "wait")  # parts of names


@pytest.mark.slow
def test_micro_batches_change_nothing_that_is_logged(tmp_path: Path) -> None:
    logged, recorded = [], []
    for name, more in (("whole", []), ("parts", ["train.micro_batch_size=2"])):
        folder = tmp_path / name
        start(folder, *SAME, *more, ranks=2, stage=3)
        logged.append([line for line in read(folder / "metrics.jsonl") if "loss" in line])
        recorded.append(read_figures(folder))
    assert len(logged[0]) == len(logged[1]) == 6
    assert len(recorded[0]) == len(recorded[1]) == 8  # two directions
    for whole, parts in zip(logged[0] + recorded[0], logged[1] + recorded[1], strict=True):
        assert whole.keys() == parts.keys()
        for name, value in whole.items():
            if any(word in name for word in TIMED) or isinstance(value, list):  # histograms, cut by rounding
                continue
            expected = pytest.approx(value, rel=2e-4, abs=1e-5) if isinstance(value, float) else value
            assert parts[name] == expected, (whole["step"], name)
    assert logged[1][-1]["queue_fill"] == 1.0
    assert logged[1][-1]["momentum_weight"] > 0
    assert logged[1][-1]["alpha"] < logged[1][0]["alpha"]
