"""Whole runs on a GPU, where batches are copied ahead: pre-training, in micro-batches too, and all tasks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved import saved_run
from starting import ROOT, losses, start

from sacl_ds.config.finetune import TASKS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

MOMENTUM = ["momentum.enabled=true", "momentum.queue_size=40", "data.scenes.count=64", "records.every=2"]
FEW = ["data.scenes.count=400", "data.scenes.eval_count=23", "train.global_batch_size=6", "train.steps=4",
       "train.log_every=1", "train.eval_every=2", "evaluation.batch_size=7", "retrieval.rerank=5"]  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pretraining(stage: int, precision: str, tmp_path: Path) -> None:
    """Half the batch at a time, without ITM's draws: the losses of one pass, as far as the precision goes."""
    made = {}
    for name, more in (("whole", []), ("parts", ["train.micro_batch_size=4"])):
        settings = [*MOMENTUM, f"train.precision={precision}", "loss.matching_weight=0", "model.dropout=0", *more]
        start(tmp_path / name, *settings, "train.steps=6", stage=stage, device="cuda")
        made[name] = losses(tmp_path / name)
    assert len(made["parts"]) == 6
    assert made["parts"] == pytest.approx(made["whole"], rel=1e-3 if precision == "fp32" else 3e-2)


@pytest.mark.parametrize("micro", [[], ["train.micro_batch_size=2"]])
@pytest.mark.parametrize("task", TASKS)
def test_fine_tuning(task: str, micro: list[str], tmp_path: Path) -> None:
    base, folder = saved_run(tmp_path / "base", seed=3, teacher=False), tmp_path / "run"
    line = ["--task", task, "--ds_config", "ds_configs/zero2.json", f"checkpoint={base}", f"output_dir={folder}"]
    done = subprocess.run(
        [sys.executable, "launch/finetune.py", *line, *FEW, *micro],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(map(math.isfinite, losses(folder)))
    figures = json.loads((folder / "results.json").read_text())["figures"]
    assert all(math.isfinite(each["value"]) for each in figures.values())
