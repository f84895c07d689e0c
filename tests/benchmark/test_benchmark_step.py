"""tools/benchmark_step.py as a command, on one rank and two: that its figures fit together, and that steps are equal
where they are said to be."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from starting import program
from step_benchmark.peers import EQUAL, OWN, Towers, own_towers, peers
from step_benchmark.setting import BenchmarkSetting, lengths, random_batch

from sacl_ds.config import ModelConfig
from sacl_ds.model.cost import ModelCost
from sacl_ds.model.sacl import SaclModel

SMALL = [
    "--device", "cpu", "--width", "32", "--heads", "2", "--depth", "2", "--text-layers", "1", "--embed-dim", "16",
    "--batch", "4", "--rounds", "2", "--warm-up", "1",
]  # fmt: skip
STEPS = ["ITC, SACL", "three losses, live teacher", *peers()]
CPU = torch.device("cpu")


def command(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """The tool on so many ranks; what all of them say."""
    return program("tools/benchmark_step.py", *SMALL, *words, ranks=ranks, check=False)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_command(tmp_path: Path, ranks: int) -> None:
    steps = STEPS if ranks > 1 else ["ITC, SACL", *peers()[:1]]  # each asks for a process of its own
    memory = ["--no-memory"] if ranks > 1 else []
    done = command("--steps", *steps, *memory, "--out", str(tmp_path / "out"), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out/results.json").read_text())
    rows = {row["step"]: row for row in results["rows"]}
    assert set(rows) == set(steps)
    for name, row in rows.items():
        assert len(row["rounds"]) == 2
        assert row["seconds"] == statistics.median(row["rounds"])
        assert row["pairs_per_second"] * row["seconds"] == pytest.approx(4)
        assert row["flops_per_second"] > 0
        assert row["mfu"] is None, "a CPU's peak is not known"
        assert (row["loss_share"] is None) == name.startswith("open_clip")
        assert (row["bytes"] is None) == (ranks > 1)
        ratios = [mine / theirs for mine, theirs in zip(row["rounds"], rows["ITC, SACL"]["rounds"], strict=True)]
        assert row["of_itc"] == pytest.approx([statistics.median(ratios), min(ratios), max(ratios)])
        assert f"| {name} |" in done.stdout
    if ranks == 1:
        assert all(row["bytes"] > 1e6 for row in rows.values())
    if peers():
        assert rows[EQUAL]["of_peer"] == [1, 1, 1]
        itc, same = (rows[name]["flops_per_second"] * rows[name]["seconds"] for name in ("ITC, SACL", EQUAL))
        assert itc < same, "captions are padded for open_clip, and ours count what is there"
    assert (tmp_path / "out/table.md").read_text() == done.stdout, "more was said, or by more than the first rank"
    width, height = Image.open(tmp_path / "out/plot.png").size
    assert width > height > 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "1"], "--batch 1: at least 2"),
        (["--micro-batch", "0"], "--micro-batch 0: at least 1"),
        (["--micro-batch", "3"], "--micro-batch 3 does not divide the 4 pairs of a rank"),
        (["--steps", "ITC"], "--steps 'ITC': there is "),
        (["--ds_config", "nowhere.json"], "cannot read the DeepSpeed configuration nowhere.json"),
        (["--heads", "5"], "must be a multiple of model.text_heads=5"),
    ],
)
def test_mistakes(words: list[str], said: str) -> None:
    done = command(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("error: ") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_no_gpu() -> None:
    done = command("--device", "cuda")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --device cuda: PyTorch finds no GPU here; leave it out, or take cpu"]


def test_micro_batches_in_bf16() -> None:
    """As the large batch of `make gpu`, whose peak is that of a micro-batch."""
    words = ["--precision", "bf16", "--micro-batch", "2", "--checkpoint", "--steps", "three losses, live teacher"]
    done = command(*words, "--no-memory")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(our steps: micro-batches of 2, activations recomputed)" in done.stdout
    assert "| three losses, live teacher |" in done.stdout


def setting(captions: str = "full") -> BenchmarkSetting:
    model = ModelConfig.model_validate({"preset": "tiny", "vocab_size": 300})
    return BenchmarkSetting(model, 4, "fp32", captions, {}, "none", CPU)  # type: ignore[arg-type]


def test_the_batch() -> None:
    made = random_batch(setting("real"), 64, 1)
    tokens = made.attention_mask.sum(1)
    assert made.pair_ids.flatten().tolist() == list(range(64, 128))
    assert made.input_ids.shape[1] == tokens.max()
    assert not made.input_ids[made.attention_mask == 0].any()
    assert made.masked_ids is not None
    assert made.mlm_labels is not None
    predicted = made.mlm_labels != -100
    assert predicted.sum(1).tolist() == [max(1, round(0.15 * (n - 2))) for n in tokens.tolist()]
    assert (made.masked_ids[predicted] == 4).all()
    assert torch.equal(made.mlm_labels[predicted], made.input_ids[predicted])
    full = random_batch(setting(), 3, 0)
    assert full.attention_mask.tolist() == [[1] * 32] * 3


def test_real_captions_are_as_long_as_flickrs() -> None:
    drawn = lengths("real", 20000, 64, torch.Generator().manual_seed(0)).double()
    assert drawn.mean() == pytest.approx(13.9, abs=0.1)
    assert drawn.std() == pytest.approx(3.9, abs=0.1)
    assert drawn.min() >= 5


@pytest.mark.skipif(not peers(), reason="needs open_clip_torch")
def test_the_peer_over_our_towers_computes_what_our_model_does() -> None:
    chosen = setting()
    torch.manual_seed(0)
    ours = SaclModel(chosen.model, 300, pretrained=False).eval()
    batch = random_batch(chosen, 4, 0)
    found = Towers(ours, 14.0)(batch.images, batch.input_ids, batch.attention_mask)
    assert torch.equal(found["image_features"], ours.encode_image(batch.images)[1])
    assert torch.equal(found["text_features"], ours.encode_text(batch.input_ids, batch.attention_mask)[1])
    assert found["logit_scale"].item() == pytest.approx(14.0)


@pytest.mark.skipif(not peers(), reason="needs open_clip_torch")
def test_its_own_towers_are_as_large() -> None:
    """All but what the two designs differ in: norms, biases of projections, types of segments."""
    assert OWN in peers()
    chosen = setting()
    ours = SaclModel(chosen.model, 300, pretrained=False)
    theirs = own_towers(chosen, ours)
    parts = ModelCost(chosen.model, vocab_size=300).parameters()
    projections = 2 * 128 * 128
    assert sum(p.numel() for p in theirs.parameters()) == pytest.approx(
        parts["image"] + parts["text"] + projections, rel=0.01
    )
