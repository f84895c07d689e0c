"""Figures of speed: by hand, against counters of FLOPs, and those of a run."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import pytest
import torch
from deepspeed.profiling.flops_profiler import FlopsProfiler
from four_layers import VOCABULARY, batch, config, similarities
from hypothesis import given
from hypothesis import strategies as st
from starting import start
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sacl_ds.config import LossConfig, RunConfig
from sacl_ds.model.cost import ModelCost
from sacl_ds.model.sacl import SaclModel
from sacl_ds.telemetry.peaks import dense_peak
from sacl_ds.telemetry.records import read
from sacl_ds.telemetry.throughput import WARM_UP, RowFlops, Throughput, flops_text, take_memory_peak
from sacl_ds.training.objective import PretrainObjective, Targets
from sacl_ds.training.pretrain_task import pair_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10", "bf16", 125),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        # resembling names of what is slower, or a part
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
    ],
)
def test_peaks(name: str, precision: str, tera: float | None) -> None:
    assert dense_peak(name, precision) == (None if tera is None else pytest.approx(tera * 1e12))


@given(st.lists(st.integers(2, 200), min_size=1, max_size=9), *(st.floats(0, 1e9) for _ in range(3)))
def test_flops_are_a_square_of_the_length(lengths: list[int], a: float, b: float, c: float) -> None:
    flops = RowFlops.through(lambda t: a + b * t + c * t * t)
    wanted = math.fsum(a + b * t + c * t * t for t in lengths)
    found = flops.of(len(lengths), sum(lengths), sum(t * t for t in lengths))
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-3)


@pytest.mark.parametrize("losses", [{}, {"matching_weight": 0}, {"mlm_weight": 0, "matching_weight": 0}])
def test_flops_of_a_pair_at_every_length(losses: dict[str, float]) -> None:
    run = RunConfig(model=config({"placement": "output"}), loss=LossConfig.model_validate(losses))
    flops = pair_flops(run, VOCABULARY)
    assert flops is not None
    for tokens in (2, 5, 10):
        predicted = run.loss.mlm_probability * (tokens - 2)
        cost = ModelCost(run.model, text_tokens=tokens, predicted=predicted, vocab_size=VOCABULARY)
        assert flops.of(1, tokens, tokens**2) == pytest.approx(cost.pretraining(run.losses).training_flops)


def test_an_encoder_of_unknown_cost_has_no_flops() -> None:
    other = config({}, image_encoder="eva02_tiny_patch14_224", image_encoder_arguments={}, image_size=224)
    assert pair_flops(RunConfig(model=other), VOCABULARY) is None
    speed = Throughput("pairs", CPU, 1, None)
    speed.add(torch.ones(4, 7))
    assert set(speed.settle(1, 1, 0.5, 4, speed.lengths())) == {
        "step_seconds", "pairs_per_second", "pairs_per_second_per_device"
    }  # fmt: skip


def objective(**loss: float) -> PretrainObjective:
    torch.manual_seed(0)
    return PretrainObjective(SaclModel(config({}), VOCABULARY, pretrained=False), LossConfig.model_validate(loss))


def test_flops_against_torchs_counter() -> None:
    """ITC alone, forward and backward: less for the gradient of pixels, which nobody needs; attention is run again in
    backward, and the matrix of similarities is the loss's own."""
    made, counter = objective(matching_weight=0, mlm_weight=0), FlopCounterMode(display=False)
    with counter:
        made(batch(4), Targets(None, 0.0, None))["loss"].backward()
    wanted = 4 * ModelCost(config({}), vocab_size=VOCABULARY).pretraining(["itc"]).training_flops
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.05)


def test_flops_against_deepspeeds_profiler() -> None:
    """Forward of all three losses: its multiply-adds are ours and those of the similarities to the last one; its FLOPs
    have biases, norms and GELU as well, under 2 % here and less the wider layers are. (Attention is counted: the
    profiler hooks PyTorch's function for it.)"""
    made, used = objective(), batch(4)
    wanted = 4 * ModelCost(config({}), vocab_size=VOCABULARY, predicted=3).pretraining().flops
    profiler = FlopsProfiler(made)
    profiler.start_profile()
    made(used, Targets(None, 0.0, torch.Generator().manual_seed(0)))
    profiler.stop_profile()
    flops, products = profiler.get_total_flops(), 2 * profiler.get_total_macs()
    profiler.end_profile()
    assert products == wanted + similarities(4)
    assert products < flops < 1.02 * products


def test_figures_by_hand() -> None:
    speed = Throughput("pairs", CPU, 2, RowFlops(100, 10, 1))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    speed.add(mask)
    speed.add(mask)
    both_ranks = 2 * speed.lengths()
    assert both_ranks.tolist() == [8, 20, 52]
    assert speed.lengths().tolist() == [0, 0, 0]
    figures = speed.settle(2, 2, 0.5, 4, both_ranks)
    assert figures == {
        "step_seconds": 0.25,
        "pairs_per_second": 16,
        "pairs_per_second_per_device": 8,
        "text_tokens": 2.5,
        "flops_per_second": (800 + 200 + 52) / 0.5 / 2,
    }


def test_a_share_of_the_peak() -> None:
    speed = Throughput("pairs", CPU, 1, RowFlops(4e5, 0, 0), peak=1e6)
    assert speed.settle(1, 1, 0.5, 1, torch.tensor([1.0, 7.0, 49.0]))["mfu"] == pytest.approx(0.8)
    speed.more({"memory_peak_bytes": 2e9, "data_wait_share": 0.031})
    assert speed.summary() == (
        "2 pairs/s, 0.5 s a step, 0.8 MFLOP/s a device, MFU 80.0%, 2 GB at the peak, 3% of the time waiting for data "
        "(medians)"
    )


def test_medians_leave_the_first_steps_out() -> None:
    speed = Throughput("questions", CPU, 1)
    assert speed.summary() is None
    speed.settle(101, 1, 9.0, 6, speed.lengths())
    assert speed.medians()["step_seconds"] == 9.0, "all that there is"
    for done, seconds in ((101 + WARM_UP - 1, 8.0), (106, 1.0), (107, 3.0), (108, 2.0)):
        speed.settle(done, 1, seconds, 6, speed.lengths())
    assert speed.medians()["step_seconds"] == 2.0
    assert speed.summary() == "3 questions/s, 2 s a step (medians)"


def test_of_memory_the_most_counts() -> None:
    speed = Throughput("pairs", CPU, 1)
    for done, held in ((1, 9e9), (11, 2e9), (21, 5e9), (31, 2e9)):
        speed.settle(done, 1, 1.0, 6, speed.lengths())
        speed.more({"memory_peak_bytes": held})
    assert speed.medians()["memory_peak_bytes"] == 5e9, "behind the first steps"


def test_units() -> None:
    assert [flops_text(x) for x in (2.5e15, 1e12, 4.12e10, 7e3)] == [
        "2.5 PFLOP",
        "1 TFLOP",
        "41.2 GFLOP",
        "0.007 MFLOP",
    ]


def test_the_peak_of_memory_grows_with_what_is_held() -> None:
    before = take_memory_peak(CPU)
    held: list[Tensor] = []
    while psutil.Process().memory_info().rss < before + 4 * 10_000_000:  # more than was ever resident
        held.append(torch.ones(10_000_000))
    assert take_memory_peak(CPU) >= before + 4 * 10_000_000 / 2


def test_a_run_says_how_fast_it_is(tmp_path: Path) -> None:
    done = start(
        tmp_path / "run", "teacher.steps=0", "train.steps=8", "train.log_every=2", "train.eval_every=3", ranks=2
    )
    lines = [line for line in read(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8]
    for line in lines:
        assert line["pairs_per_second"] * line["step_seconds"] == pytest.approx(16)
        assert line["pairs_per_second_per_device"] == pytest.approx(line["pairs_per_second"] / 2)
        assert 0 <= line["data_wait_share"] < 1
        assert 1e8 < line["memory_peak_bytes"] < 1e11
        assert 5 < line["text_tokens"] <= 32
        assert line["flops_per_second"] > 0
        assert "mfu" not in line, "a CPU's peak is not known"
    said = [line for line in done.stdout.splitlines() if line.startswith("training: ")]
    assert len(said) == 1
    assert "pairs/s" in said[0]
    assert "waiting for data (medians)" in said[0]
