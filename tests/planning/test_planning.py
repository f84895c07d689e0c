"""Formulas of memory, traffic and time: by hand for simple models, and against real ranks."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from scaling.checking import COLLECTIVES, Compared
from scaling.job import PlannedJob, Zero
from scaling.memory import activations, memory
from scaling.record import read_record, record_limited, record_row
from scaling.time import H100, StepTime, hours, step_flops, step_time
from scaling.watch import SeenOnTheWire, allocations, live_tensors
from scaling.wire import contrastive, contrastive_with_keys, total, transfers
from scaling_page import page
from starting import program

from sacl_ds.command_line import exit_status
from sacl_ds.config import RunConfig
from sacl_ds.ds_config import read_ds_config
from sacl_ds.errors import UserError
from sacl_ds.losses import Keys, similarity_regulated_loss
from sacl_ds.model.sacl import SaclModel


def job(  # of `loss` and `momentum` settings by name
    world: int = 2,
    batch: int = 16,
    precision: str = "fp32",
    zero: Zero | None = None,
    micro: int | None = None,
    preset: str = "tiny",
    loss: dict[str, Any] | None = None,
    momentum: dict[str, Any] | None = None,
    teacher_width: int = 0,
    **train: Any,
) -> PlannedJob:
    values = {"global_batch_size": batch, "precision": precision, "micro_batch_size": micro, **train}
    rooms = {"model": {"preset": preset}, "train": values, "loss": loss or {}, "momentum": momentum or {}}
    return PlannedJob(RunConfig.model_validate(rooms), world, zero or Zero(), teacher_width=teacher_width)


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


def test_activations_follow_the_micro_batch() -> None:
    assert activations(job(2, 64, micro=8)) == activations(job(2, 64)) / 4


def test_itc_alone_leaves_the_fusion_encoder_out() -> None:
    loss = {"matching_weight": 0.0, "mlm_weight": 0.0}
    alone, all_of_it = job(2, zero=Zero(1), loss=loss), job(2, zero=Zero(1))
    model = SaclModel(alone.run.model, alone.run.model.vocab_size, pretrained=False)
    unreached = model.fusion_encoder, model.matching_head, model.mlm_head
    unused = sum(p.numel() for part in unreached for p in part.parameters())
    assert alone.parameters == all_of_it.parameters - unused
    kept, of_all = memory(alone).kept, memory(all_of_it).kept
    assert sum(kept.values()) == pytest.approx(sum(of_all.values()) - 12 * unused / 2, rel=1e-6)  # the optimizer's half
    assert kept["parameters"] + kept["parameters that are not trained"] == of_all["parameters"]
    assert activations(alone) < 0.5 * activations(all_of_it)
    assert step_flops(alone) < 0.5 * step_flops(all_of_it)
    sent = [next(each.payload for each in transfers(one) if each.purpose == "gradients") for one in (alone, all_of_it)]
    assert sent[1] - sent[0] == 4 * unused


@pytest.mark.parametrize(("precision", "bytes_of"), [("fp32", 4), ("bf16", 2)])
def test_checkpointing_keeps_what_goes_into_blocks_by_hand(precision: str, bytes_of: int) -> None:
    """base: 12 layers of 257 tokens, 6 and 6 layers of 30 tokens, all 768 wide; two and four texts a pair."""
    kept = job(2, 64, precision, preset="base", checkpoint_activations=True)
    inputs = 12 * 257 * 768 + (2 * 6 + 4 * 6) * 30 * 768
    pixels, embedded, last_norm = 3 * 256**2, 2 * 30 * (768 + 2), 257 * (2 * 768 + 2)
    predicted = 0.15 * 28 * (4 * 768 + 2 + kept.run.model.vocab_size)
    heads = 2 * 2 * 256 + 3 * 768 + predicted
    others = bytes_of * (pixels + embedded + last_norm + heads) + (2 * 257 * 768 if precision == "bf16" else 0)
    assert activations(kept) == pytest.approx(32 * (4 * inputs + others))
    again = memory(kept).forward["block computed again"]
    image_block = 257 * (16 * 768 + 4 + 12)  # norms, queries, keys, values, results, the hidden layer twice; by row
    assert again >= 32 * bytes_of * image_block
    assert again + activations(kept) < 0.3 * activations(job(2, 64, precision, preset="base"))


def test_checkpointing_with_patch_selection_is_refused() -> None:
    values = {"model": {"patch_selection": {"placement": "output"}}, "train": {"checkpoint_activations": True}}
    with pytest.raises(UserError, match=r"patch_selection.*checkpoint_activations") as error:
        activations(PlannedJob(RunConfig.model_validate(values), 1, Zero()))
    assert "\n" not in str(error.value)


def test_gradients_of_earlier_micro_batches() -> None:
    """Whole where they are reduced once, a share where every micro-batch reduces them."""
    alone = job()
    for stage, coalesce, left in (
        (0, False, 1),
        (1, False, 1),
        (2, False, 0.5),
        (2, True, 1),
        (3, False, 0),
        (3, True, 1),
    ):
        held = memory(job(2, 64, zero=Zero(stage), micro=8, coalesce_reduction=coalesce)).forward["gradients"]
        assert held == pytest.approx(left * 4 * alone.parameters, rel=0.001), (stage, coalesce)


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
    def payload(stage: int, purpose: str = "gradients", **more: Any) -> float:
        made = transfers(job(2, 64, zero=Zero(stage, persistent=0), **more))
        return sum(each.payload for each in made if each.purpose == purpose)

    for stage, times in ((0, 1), (1, 1), (2, 4), (3, 4)):
        assert payload(stage, micro=8) == times * payload(stage)
        assert payload(stage, micro=8, coalesce_reduction=True) == payload(stage)
    assert payload(2, "parameters", micro=8) == payload(2, "parameters")
    late = job().cost.parameters()["fusion"], job().cost.parameters()["heads"]
    assert 4 + 4 * 0.9 * late[0] / job().parameters < payload(3, "parameters", micro=8) / payload(3, "parameters") < 8


def test_flops_by_hand() -> None:
    """base, 30 tokens: products of the towers as one reads them off the papers, and the similarities of the batch."""
    wide, hidden, patches, text = 768, 3072, 256, 30

    def block(tokens: int, seen: int = 0) -> int:
        """Attention to itself, perhaps to `seen` others, and the hidden layer: multiplications and additions."""
        itself = 8 * tokens * wide**2 + 4 * tokens**2 * wide
        others = 4 * tokens * wide**2 + 4 * seen * wide**2 + 4 * tokens * seen * wide if seen else 0
        return itself + others + 4 * tokens * wide * hidden

    loss = {"matching_weight": 0.0, "mlm_weight": 0.0}
    towers = 12 * block(patches + 1) + 2 * patches * wide * 3 * 16**2 + 6 * block(text) + 2 * 2 * wide * 256
    found = step_flops(job(2, 64, preset="base", loss=loss))
    assert found == pytest.approx(32 * (3 * towers + 8 * 64 * 256), rel=1e-3)
    assert step_flops(job(2, 64, preset="base", loss=loss, micro=8)) == pytest.approx(found + 32 * towers, rel=1e-3)
    again = step_flops(job(2, 64, preset="base", loss=loss, checkpoint_activations=True))
    assert again == pytest.approx(found + 32 * towers, rel=1e-3)
    believed = job(2, 64, preset="base", loss=loss, momentum={"enabled": True, "queue_size": 1000})
    assert step_flops(believed) == pytest.approx(32 * (4 * towers + 12 * 1064 * 256), rel=1e-3)
    shared = 3 * 6 * 4 * (patches + 1) * wide**2  # an image's keys and values, once for four texts
    fused = 4 * 6 * block(text, patches + 1) - shared
    heads = 3 * 2 * wide * 2 + 0.15 * 28 * (2 * wide * (wide + 30522))
    a_pair = 3 * (towers + 6 * block(text) + fused + heads) + 8 * 64 * 256
    assert step_flops(job(2, 64, preset="base")) == pytest.approx(32 * a_pair, rel=1e-3)


def test_time() -> None:
    plain = job(2, 64)
    took = step_time(plain, H100)
    assert took.compute == pytest.approx(step_flops(plain) / (0.4 * 989e12))
    assert took.backward == pytest.approx(2 / 3 * took.compute, rel=0.01)
    covered = StepTime(compute=3.0, backward=2.0, hidden=2.5, open=0.25)
    assert covered.least == 1.0 + 2.5 + 0.25
    assert covered.most == 3.0 + 2.5 + 0.25
    fewest, most = hours(plain, H100, 1e6)
    assert fewest == pytest.approx(1e6 / 64 * took.least / 3600)
    assert fewest <= most
    assert step_time(job(16, 64), H100).open > step_time(job(8, 64), H100).open  # over the network


def losses_on_the_wire(rank: int, folder: Path) -> None:
    """The loss as a step calls it, forward and backward, with a teacher, and against keys."""
    g = torch.Generator().manual_seed(rank)
    rows, width, of_teacher = 256, 128, 48
    image, text, *keys = (torch.nn.functional.normalize(torch.randn(rows, width, generator=g)) for _ in range(4))
    teacher = [torch.nn.functional.normalize(torch.randn(rows, of_teacher, generator=g)) for _ in range(2)]
    ids = (rank * rows + torch.arange(rows))[:, None].expand(-1, 2).contiguous()
    found = {}
    for name, against in (("keys", Keys(*keys)), ("no keys", None)):
        with SeenOnTheWire() as seen:
            similarity_regulated_loss(
                image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(14.0), alpha=0.5,
                teacher_image=teacher[0], teacher_text=teacher[1], pair_ids=ids, keys=against, counts=[rows] * 2,
            ).loss.backward()  # fmt: skip
        found[name] = {collective: seen.total(collective) for collective in COLLECTIVES}
    if rank == 0:
        (folder / "seen.json").write_text(json.dumps(found))


def test_what_the_loss_sends(tmp_path: Path) -> None:
    on_ranks(2, losses_on_the_wire, tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    described = job(2, 512, teacher_width=48)
    assert described.run.model.embed_dim == 128
    for name, made in (("no keys", contrastive(described)), ("keys", contrastive_with_keys(described))):
        assert seen[name] == {collective: total(made, collective) for collective in COLLECTIVES}, name


@pytest.mark.parametrize(("world", "more"), [(3, {}), (2, {"micro": 3})])
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


@pytest.mark.slow
def test_real_ranks_hold_and_send_what_the_formulas_say(root: Path, tmp_path: Path) -> None:
    """Two ranks, ZeRO 2 in one pass and 3 in four, through the tool: within 15 %, traffic within 1 %."""
    record = tmp_path / "measured.json"
    line = ["tools/measure_scaling.py", "--size", "small", "--worlds", "2", "--docs", record]
    for case in (["--stages", "2", "--itc"], ["--stages", "3", "--micro-batches", "4"]):
        program(*line, *case)
    rows = json.loads(record.read_text())["rows"]
    assert [(row["case"]["micro_batches"], row["case"]["stage"]) for row in rows] == [(1, 2), (4, 3)]
    for row in rows:
        for name, ratio in Compared.of(row).ratio.items():
            within = 0.01 if name in ("all-reduce", "all-gather", "reduce-scatter", "parameters", "optimizer") else 0.15
            assert ratio == pytest.approx(1, abs=within), (row["case"], name)


def test_a_measured_row_takes_the_place_of_its_case(tmp_path: Path) -> None:
    def row(stage: int, figure: int, **more: Any) -> dict[str, Any]:
        case = {
            "size": "small", "pairs": 12, "world": 2, "stage": stage, "precision": "fp32", "offload": False,
            "micro_batches": 1, "coalesced": False, "checkpointed": False, "itc_alone": False,
        }  # fmt: skip
        return {"case": case | more, "figure": figure}

    path = tmp_path / "measured.json"
    for made in (row(3, 1), row(1, 2), row(1, 3, precision="bf16"), row(1, 4, micro_batches=4), row(3, 5)):
        record_row(path, made)
    record_limited(path, {"arms": ["a line"]})
    found = read_record(path)
    assert [each["figure"] for each in found["rows"]] == [2, 5, 4, 3]
    assert found["limited"] == {"arms": ["a line"]}


@pytest.mark.parametrize("held", ["no JSON", "[]", '{"rows": 3}'])
def test_another_file_is_not_written_over(tmp_path: Path, held: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(held)
    with pytest.raises(UserError, match=r"other\.json") as error:
        record_row(path, {"case": {}})
    assert "\n" not in str(error.value)
    assert path.read_text() == held


@pytest.mark.parametrize(
    ("options", "named"), [("--offload", "--stages 2 3"), ("--micro-batches 1 5", "no divisor of --pairs 12")]
)
def test_options_that_do_not_fit_say_so(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str,
    named: str,
) -> None:  # fmt: skip
    told = ["measure_scaling.py", *options.split(), "--docs", str(tmp_path / "measured.json")]
    monkeypatch.setattr(sys, "argv", told)
    assert exit_status(runpy.run_path(str(root / "tools/measure_scaling.py"))["main"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said


@pytest.mark.slow
def test_the_page_in_docs_is_what_the_command_prints(root: Path) -> None:
    measured = read_record(root / "docs/lab/scaling_measured.json")
    told = "python tools/scaling_page.py docs/lab/scaling.md"
    assert (root / "docs/lab/scaling.md").read_text() == page(measured), told
