"""Formulas of memory, traffic and time: by hand for simple models, and against real ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks

from sacl_ds.config import RunConfig
from sacl_ds.ds_config import read_ds_config
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.planning.job import Job, Zero
from sacl_ds.planning.memory import activations, memory
from sacl_ds.planning.page import page
from sacl_ds.planning.time import H100, hours, step_flops, step_time
from sacl_ds.planning.watch import SeenOnTheWire, allocations, live_tensors
from sacl_ds.planning.wire import total, transfers


def job(world: int = 2, batch: int = 16, precision: str = "fp32", zero: Zero | None = None, **more: Any) -> Job:
    run = RunConfig.model_validate({"train": {"global_batch_size": batch, "precision": precision}})
    return Job(run, world, zero or Zero(), **more)


def test_parameters_are_those_of_the_model() -> None:
    described = job()
    model = SaclModel(described.run.model, described.run.model.vocab_size, pretrained=False)
    assert described.parameters == sum(p.numel() for p in model.parameters())
    linear = sum(p.numel() for m in model.modules() if type(m) is torch.nn.Linear for p in m.parameters(recurse=False))
    convolution = sum(p.numel() for p in model.image_encoder.vit.patch_embed.parameters())
    assert described.cast == 0
    assert job(precision="bf16").cast == linear + convolution


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_the_shipped_configurations_are_read(root: Path, name: str) -> None:
    ds = read_ds_config(root / f"ds_configs/{name}.json")
    zero = Zero.of(ds)
    assert zero.stage == int(name[4])
    assert zero.reduce_bucket == ds["zero_optimization"]["reduce_bucket_size"]
    assert zero.double == (zero.stage > 1)
    assert (zero.optimizer == "cpu") == ("offload" in name)
    assert (zero.parameters == "cpu") == (name == "zero3_offload")


def test_adam_in_float32_is_sixteen_bytes_a_parameter() -> None:
    """Weights, gradients, two averages: whole at ZeRO 0, and a copy more where they are cut."""
    alone = job(1)
    found = memory(alone)
    assert found.at_rest == 12 * alone.parameters
    assert found.backward == {"gradients": 4 * alone.parameters, "buckets": 4 * alone.parameters}
    cut = memory(job(4, zero=Zero(stage=3, reduce_bucket=1000, persistent=0)))
    assert cut.at_rest == pytest.approx(20 * alone.parameters / 4 + 4000, rel=0.01)


@given(st.sampled_from([1, 2, 3]), st.sampled_from([2, 4, 8, 16]), st.sampled_from(["fp32", "bf16"]))
@settings(deadline=None, max_examples=12)
def test_more_ranks_and_higher_stages_never_need_more_between_steps(stage: int, world: int, precision: str) -> None:
    def rest(ranks: int, of: int) -> float:
        kept = memory(job(ranks, 16 * ranks, precision, Zero(of, 1000, persistent=0))).kept
        return kept["parameters"] + kept["optimizer"]

    assert rest(2 * world, stage) < rest(world, stage)
    assert rest(world, stage) <= rest(world, stage - 1)


def test_activations_follow_the_micro_batch_and_checkpointing() -> None:
    whole = job(2, 64)
    assert activations(job(2, 64, micro_batch=8)) == activations(whole) / 4
    assert activations(whole) == 32 * whole.cost.pretraining().bytes
    run = RunConfig.model_validate({"model": {"preset": "base"}, "train": {"global_batch_size": 64}})
    base = [activations(Job(run, 2, Zero(), checkpointed=on)) for on in (False, True)]
    inputs = 12 * 257 * 768 + (2 * 6 + 4 * 6) * 30 * 768  # of 12, 6 and 6 layers, by hand
    assert 32 * 4 * inputs < base[1] < 0.25 * base[0]


def test_offloading_moves_and_loses_nothing() -> None:
    here, away = (memory(job(2, zero=Zero(3, 1000, optimizer=device))) for device in (None, "cpu"))
    disk = memory(job(2, zero=Zero(3, 1000, optimizer="nvme")))
    assert away.host["optimizer"] == here.kept["optimizer"] == disk.disk["optimizer"]
    assert "optimizer" not in away.kept
    assert not disk.host
    assert away.at_rest < here.at_rest


def test_rings() -> None:
    made = {each.purpose: each for each in transfers(job(4, zero=Zero(2)))}
    size = 4 * job(4).parameters
    assert made["gradients"].sent(4) == pytest.approx(1.5 * size)
    assert made["parameters"].sent(4) == pytest.approx(0.75 * size)
    assert transfers(job(1)) == []


def test_micro_batches_repeat_what_they_must() -> None:
    def gradients(stage: int, **more: Any) -> float:
        made = transfers(job(2, 64, zero=Zero(stage), **more))
        return sum(each.payload for each in made if each.purpose == "gradients")

    for stage, times in ((0, 1), (1, 1), (2, 4), (3, 4)):
        assert gradients(stage, micro_batch=8) == times * gradients(stage)
        assert gradients(stage, micro_batch=8, coalesced=True) == gradients(stage)


def test_flops_and_time_by_hand() -> None:
    plain = job(2, 64)
    a_pair = 3 * plain.cost.pretraining().flops
    assert step_flops(plain) == 32 * (a_pair + 8 * 64 * plain.run.model.embed_dim)
    again = plain.cost.image(guided=False)[0].flops + plain.cost.text().flops
    assert step_flops(job(2, 64, micro_batch=8)) == step_flops(plain) + 32 * again
    took = step_time(plain, H100)
    assert took.compute == step_flops(plain) / (0.4 * 989e12)
    assert took.least <= took.most
    fewest, most = hours(plain, H100, 1e6)
    assert fewest == pytest.approx(1e6 / 64 * took.least / 3600)
    assert fewest <= most
    assert step_time(job(16, 64), H100).open > step_time(job(8, 64), H100).open  # over the network


@pytest.mark.parametrize(("world", "more"), [(3, {}), (2, {"micro_batch": 3}), (2, {"micro_batch": 0})])
def test_a_batch_that_does_not_divide_says_so(world: int, more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="does not divide") as error:
        job(world, **more)
    assert "\n" not in str(error.value)


def count_collectives(rank: int, folder: Path) -> None:
    with SeenOnTheWire() as seen:
        dist.all_reduce(torch.ones(10))
        dist.all_gather_into_tensor(torch.empty(6, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
        dist.reduce_scatter_tensor(torch.empty(4, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16))
        dist.all_gather([torch.empty(5) for _ in range(2)], torch.ones(5))
    if rank == 0:
        found = {f"{name} {dtype}": count for (name, dtype), count in seen.payload.items()}
        (folder / "seen.json").write_text(json.dumps(found))


def test_what_is_seen_on_the_wire(tmp_path: Path) -> None:
    on_ranks(2, count_collectives, tmp_path)
    assert json.loads((tmp_path / "seen.json").read_text()) == {
        "all-reduce torch.float32": 40,
        "all-gather torch.int64": 48,
        "reduce-scatter torch.bfloat16": 16,
        "all-gather torch.float32": 40,
    }


def test_what_is_seen_of_memory() -> None:
    def work(mark: Any) -> None:
        kept = torch.ones(1000)
        mark("one")
        more = torch.ones(5000)
        del more
        mark("two")
        assert kept.numel()

    seen = allocations(work)
    assert seen.at("one") == seen.at("two") == 4000
    assert seen.peak("one", "two") == 24000
    before = live_tensors()
    kept = torch.ones(777)
    assert [size for storage, size in live_tensors().items() if storage not in before] == [kept.nbytes]


def test_real_ranks_hold_and_send_what_the_formulas_say(root: Path, tmp_path: Path) -> None:
    """Two ranks, ZeRO 2 and 3, through the tool: within 15 %, traffic within 1 %."""
    line = ["tools/measure_scaling.py", "--size", "small", "--pairs", "16", "--worlds", "2", "--stages", "2", "3"]
    done = subprocess.run([sys.executable, *line, "--out", str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["case"]["stage"] for row in rows] == [2, 3]
    for row in rows:
        for name, ratio in row["ratio"].items():
            within = 0.01 if name in ("all-reduce", "all-gather", "reduce-scatter", "parameters", "optimizer") else 0.15
            assert ratio == pytest.approx(1, abs=within), (row["case"], name)
    assert total(transfers(job()), "all-reduce") > 0


def test_the_page_in_docs_is_what_the_command_prints(root: Path) -> None:
    measured = root / "docs/scaling_measured.json"
    told = "python -m sacl_ds.planning.page docs/scaling.md"
    assert (root / "docs/scaling.md").read_text() == page(json.loads(measured.read_text())), told
