"""tools/benchmark_patches.py as a command; that it measures what it says."""

from __future__ import annotations

import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from starting import program

from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel

SMALL = [
    "--preset", "tiny", "--width", "32", "--heads", "2", "--depth", "3", "--patch", "8", "--layers", "1", "2",
    "--batch", "2", "--threads", "1",
]  # fmt: skip


def test_the_command(tmp_path: Path) -> None:
    sizes = ["--size", "32", "48", "--rounds", "2", "--placements", "tower", "output"]
    done = program("tools/benchmark_patches.py", *SMALL, *sizes, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        assert row["slowest"] <= row["speed"] <= row["fastest"]
        assert len(row["seconds"]) == 2
        assert (row["speed"] == 1) == (row["placement"] == "none")
    by_use = {(row["use"], row["placement"]): row["gflops"] for row in rows if row["size"] == 48}
    assert by_use["finetuning", "tower"] == pytest.approx(3 * by_use["inference", "tower"])
    assert by_use["inference", "tower"] < by_use["inference", "none"] < by_use["pretraining", "none"]
    assert (tmp_path / "out/table.md").read_text() == done.stdout
    assert done.stdout.count("\n") == 2 + 2 + len(rows)
    width, height = Image.open(tmp_path / "out/plot.png").size
    assert width > 2 * height > 600


def test_placements_share_their_weights(root: Path) -> None:
    """And compute what a model of that placement computes."""
    tool = runpy.run_path(str(root / "tools/benchmark_patches.py"))
    options = Namespace(
        preset="tiny", width=32, heads=2, depth=3, patch=8, text_tokens=12, keep_rate=0.5, layers=[1, 2]
    )
    configs = {name: tool["model_config"](options, 32, name) for name in ("none", "tower")}
    torch.manual_seed(0)
    source, own = (SaclModel(configs[name], 50, pretrained=False).eval() for name in configs)
    own.load_state_dict(source.state_dict())
    shared = tool["with_weights_of"](source, configs["tower"]).eval()
    assert [id(p) for p in shared.parameters()] == [id(p) for p in source.parameters()]
    images = tool["random_batch"](2, 12, 32, 50, 2, torch.device("cpu")).images
    guide = torch.randn(2, 32)
    found, wanted = (model.image_encoder(images, guide) for model in (shared, own))
    assert torch.equal(found.tokens, wanted.tokens)
    assert found.tokens.shape[1] < 17


def test_the_batch_predicts_so_many_tokens(root: Path) -> None:
    batch = runpy.run_path(str(root / "tools/benchmark_patches.py"))["random_batch"](
        3, 12, 32, 50, 2, torch.device("cpu")
    )
    assert (batch.mlm_labels != -100).sum(1).tolist() == [2, 2, 2]
    assert (batch.masked_ids == 4).sum(1).tolist() == [2, 2, 2]
    assert not (batch.mlm_labels[:, 0] != -100).any()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--batch", "1"], "--batch 1 --rounds 5: at least 2 pairs"),
        (["--width", "31"], "model.text_width=31 must be a multiple of"),
        (["--layers", "9"], "no layer 9 in its 3; set model.patch_selection.layers"),
        (["--keep-rate", "0"], "keep_rate=0.0 keeps no patch"),
    ],
)
def test_mistakes(root: Path, arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["benchmark_patches.py", *SMALL, "--size", "32", *arguments]
    monkeypatch.setattr(sys, "argv", words)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(UserError, match=line) as error:
            runpy.run_path(str(root / "tools/benchmark_patches.py"))["main"]()
    finally:
        torch.set_num_threads(threads)
    assert "\n" not in str(error.value)
