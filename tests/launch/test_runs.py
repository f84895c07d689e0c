"""Whole runs of the command line, as a user starts them, with real checkpoints."""

import json
import re
from functools import cache, partial
from pathlib import Path

import pytest
from faulty import dying
from starting import losses, program, start

from sacl_ds.files import require_unchanged
from sacl_ds.telemetry.records import read

CONTRASTIVE_ONLY = ["loss.matching_weight=0", "loss.mlm_weight=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """run(ranks, stage, *arguments): the directory of that run, made once."""
    base = tmp_path_factory.mktemp("runs")

    @cache
    def run(ranks: int, stage: int | str, *arguments: str) -> Path:
        folder = base / re.sub(r"\W+", "-", f"{ranks} {stage} {' '.join(arguments)}")
        start(folder, *arguments, ranks=ranks, stage=stage)
        return folder

    return run


@pytest.mark.slow
def test_the_same_run_twice_is_equal_to_the_bit(runs, tmp_path: Path) -> None:
    first = runs(1, 2)
    start(tmp_path / "again", launcher=True)
    a, b = losses(first), losses(tmp_path / "again")
    assert len(a) == 20
    assert a == b
    assert losses(first / "teacher") == losses(tmp_path / "again/teacher")


def test_a_finished_run_holds_what_it_should(runs) -> None:
    folder = runs(1, 2)
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "checkpoints", "plots", "tokenizer", "model.safetensors", "teacher"
    }  # fmt: skip
    for place in (folder, folder / "teacher"):
        require_unchanged(place, "RUN")
        files = json.loads((place / "checksums.json").read_text())["files"]
        assert files.keys() >= {"config.yaml", "model.safetensors", "tokenizer/tokenizer.json"}
    assert {p.name for p in (folder / "plots").iterdir()} == {"losses.png", "retrieval.png"}
    lines = read(folder / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    for name in ("itc", "itm", "mlm", "alpha", "logit_scale", "pmi_positive", "pmi_negative", "pmi_negative_target",
                 "infonce_bound", "pairs_per_second", "step_seconds", "grad_norm"):  # fmt: skip
        assert all(name in line for line in training), name
    assert training[0]["alpha"] == 1.0
    assert training[-1]["alpha"] < 1.0
    evaluation = [line for line in lines if "evaluation" in line][-1]
    assert 0 <= evaluation["evaluation"]["text_to_image_any_R@1"] <= 1
    assert evaluation["chance"]["text_to_image_R@10"] == pytest.approx(0.5)


def kill(folder: Path, at: int, *arguments: str) -> None:
    """A run of one rank that gets kill -9 before step number `at` of its main phase."""
    assert start(folder, *arguments, before=partial(dying, at), check=False).returncode == -9


def test_resume_goes_on_as_if_never_stopped(runs, tmp_path: Path) -> None:
    """Stopped by kill -9 after the checkpoint at step 10; then the rest, to the bit."""
    whole = losses(runs(1, 2))
    folder = tmp_path / "stopped"
    kill(folder, 13, "train.save_every=5")
    assert (folder / "checkpoints/latest").read_text() == "step_00000010"
    start(folder, "--resume", "train.save_every=5")
    assert losses(folder) == whole


def test_two_ranks_lose_as_much_as_one(runs) -> None:
    arguments = (*CONTRASTIVE_ONLY, "model.dropout=0")
    one, two = losses(runs(1, 2, *arguments)), losses(runs(2, 2, *arguments))
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3, "2_offload", "3_offload"])
def test_zero_stages_agree(stage: int | str, runs) -> None:
    """All five files of ds_configs; the offloaded ones step with DeepSpeed's CPU Adam where it can be built."""
    one = losses(runs(2, 1))
    assert len(one) == 20
    assert losses(runs(2, stage)) == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_keeps_the_logit_scale_in_fp32(stage: int, tmp_path: Path) -> None:
    start(tmp_path / "run", "train.precision=bf16", "teacher.steps=0", "train.steps=6", ranks=2, stage=stage)
    scales = losses(tmp_path / "run", "logit_scale")
    assert all(abs(loss) < 50 for loss in losses(tmp_path / "run"))
    # bf16 has steps of 1/16 at 14; learned from 1/0.07 by small steps, the scale must not stand still on that grid
    assert len(set(scales)) == len(scales)
    assert all(abs(s - 1 / 0.07) < 0.5 for s in scales)


def test_a_run_directory_is_never_overwritten(runs) -> None:
    folder = runs(1, 2)
    before = (folder / "metrics.jsonl").read_text()
    done = start(folder, check=False)
    assert done.returncode != 0
    assert "already holds a run; go on with --resume" in done.stderr
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """220 scenes in uneven shards: a little under 14 batches of 16 an epoch."""
    folder = tmp_path_factory.mktemp("shards")
    program("tools/make_shards.py", "scenes", "--per-shard", "90", "--count", "220", "--out", folder)
    return str(folder / "{00000..00002}.tar")


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        pytest.param(2, 2, marks=pytest.mark.slow),
        (2, 3),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in [(4, 1), (2, "2_offload"), (2, "3_offload")]),
    ],
)
def test_resume_with_other_ranks_and_workers(shards: str, ranks: int, stage: int | str, tmp_path: Path) -> None:
    """Killed in the first epoch, resumed by more ranks: the same batches, to the last key, and the same losses."""
    arguments = [
        "data.source=shards", f"data.shards={shards}", "teacher.steps=0", "model.dropout=0", *CONTRASTIVE_ONLY,
        "--ds_config", f"ds_configs/zero{stage}.json", "optim.lr_image=0.003", "optim.weight_decay=1",
    ]  # fmt: skip
    start(tmp_path / "whole", *arguments)
    kill(tmp_path / "stopped", 11, *arguments, "train.save_every=5", "data.workers=2")
    start(tmp_path / "stopped", "--resume", *arguments, "seed=0", "data.workers=1", ranks=ranks)
    whole, resumed = (read(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    assert [line["batch_digest"] for line in resumed if "loss" in line] == [
        line["batch_digest"] for line in whole if "loss" in line
    ]
    assert len({line["batch_digest"] for line in whole if "loss" in line}) == 20
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert not list((tmp_path / "stopped/checkpoints").glob("*universal*"))


def test_resume_with_other_data_says_so(shards: str, tmp_path: Path) -> None:
    arguments = ["data.source=shards", f"data.shards={shards}", "teacher.steps=0", *CONTRASTIVE_ONLY]
    start(tmp_path / "run", *arguments, "train.steps=2")
    done = start(tmp_path / "run", "--resume", *arguments, "train.steps=3", "data.streams=2")
    assert "the data or their order are not those of the checkpoint" in done.stdout
    require_unchanged(tmp_path / "run", "RUN")  # of the weights and the configuration that it went on to
    assert len(losses(tmp_path / "run")) == 3


def test_a_finished_run_is_a_teacher(runs, tmp_path: Path) -> None:
    teacher = runs(1, 2) / "teacher"
    before = (teacher / "model.safetensors").read_bytes()
    start(tmp_path / "run", f"teacher.checkpoint={teacher}", "train.steps=3")
    assert (teacher / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "run/teacher").exists()
    assert losses(tmp_path / "run", "alpha")[0] == 1.0


@pytest.mark.slow
def test_shards_train_like_a_user_would(tmp_path: Path) -> None:
    for name, count, seed in (("train", "300", "1"), ("val", "20", "9")):
        size = ["--per-shard", "100", "--count", count, "--seed", seed]
        program("tools/make_shards.py", "scenes", *size, "--out", tmp_path / name)
    start(
        tmp_path / "run",
        "data.source=shards",
        f"data.shards={tmp_path}/train/{{00000..00002}}.tar",
        f"data.eval_shards={tmp_path}/val/00000.tar",
        "train.steps=5",
        "data.workers=2",
        ranks=2,
    )
    evaluation = [line for line in read(tmp_path / "run/metrics.jsonl") if "evaluation" in line][-1]
    assert evaluation["chance"]["text_to_image_R@1"] == pytest.approx(1 / 20)
    assert "text_to_image_mAP" not in evaluation["evaluation"]
    assert json.loads((tmp_path / "train/00000_stats.json").read_text())["successes"] == 100
