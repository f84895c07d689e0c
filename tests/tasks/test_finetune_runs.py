"""Fine-tuning and evaluation as a user starts them: whole runs of every task, resumed, on other ranks and stages."""

import csv
import json
from functools import cache, partial
from pathlib import Path

import pytest
from faulty import dying
from safetensors import safe_open
from saved import saved_run
from starting import losses, program

from sacl_ds.config.finetune import TASKS
from sacl_ds.files import require_unchanged
from sacl_ds.telemetry.records import read

FEW = ["data.scenes.count=400", "data.scenes.eval_count=23", "train.global_batch_size=6", "train.steps=8",
       "train.log_every=1", "train.eval_every=4", "evaluation.batch_size=7", "retrieval.rerank=5",
       "retrieval.gallery=2", "data.workers=0"]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("base") / "run", seed=3, teacher=False)


@pytest.fixture(scope="module")
def tuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory):
    """tuned(task, ranks, stage, *arguments): the directory of that run, made once."""
    base = tmp_path_factory.mktemp("tuned")

    @cache
    def run(task: str, ranks: int = 1, stage: int = 2, *arguments: str) -> Path:
        folder = base / f"{task}-{ranks}-{stage}-{len(arguments)}"
        line = ["--task", task, "--ds_config", f"ds_configs/zero{stage}.json", f"checkpoint={pretrained}"]
        program("launch/finetune.py", *line, f"output_dir={folder}", *FEW, *arguments, ranks=ranks)
        return folder

    return run


def results(folder: Path) -> dict[str, float]:
    return {name: each["value"] for name, each in json.loads((folder / "results.json").read_text())["figures"].items()}


def digests(folder: Path) -> list[str]:
    return [line["batch_digest"] for line in read(folder / "metrics.jsonl") if "batch_digest" in line]


FILES = {"retrieval": {"rankings.jsonl", "gallery.png"}, "vqa": {"predictions.json"}, "nlvr2": {"predictions.csv"}}


@pytest.mark.parametrize("task", TASKS)
def test_a_finished_run_holds_what_it_should(task: str, tuned) -> None:
    folder = tuned(task)
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "checkpoints", "plots", "tokenizer", "model.safetensors", "best.json",
        "results.json", "start.txt", *FILES[task],
    }  # fmt: skip
    require_unchanged(folder, "RUN")
    sealed = json.loads((folder / "checksums.json").read_text())["files"].keys()
    assert sealed >= {"config.yaml", "model.safetensors", "tokenizer/tokenizer.json"}
    assert ("answers.json" in sealed) == (task == "vqa")
    assert [p.name for p in (folder / "plots").iterdir() if p.suffix == ".png"]
    kept = {p.name for p in (folder / "checkpoints").iterdir() if p.is_dir()}
    assert kept == {"step_00000008"}  # the newest alone
    best = json.loads((folder / "best.json").read_text())
    evaluations = {line["step"]: line["evaluation"] for line in read(folder / "metrics.jsonl") if "evaluation" in line}
    assert set(evaluations) == {4, 8}
    values = {step: figures[best["figure"]] for step, figures in evaluations.items()}
    assert best["value"] == pytest.approx(max(values.values()), abs=1e-8)
    assert best["step"] == min(step for step, value in values.items() if value == max(values.values()))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sacl_ds"])["step"] == best["step"]


@pytest.mark.parametrize(
    "task", [pytest.param("vqa", marks=pytest.mark.slow), *(task for task in TASKS if task != "vqa")]
)
def test_evaluation_is_the_same_on_any_number_of_ranks(task: str, tuned, tmp_path: Path) -> None:
    """23 scenes, which neither 2 nor 3 divides; each rank count gives the figures that the run itself ended with."""
    folder = tuned(task)
    expected = results(folder)
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        program("launch/evaluate.py", f"checkpoint={folder}", f"output_dir={out}", ranks=ranks)
        assert results(out) == pytest.approx(expected, abs=1e-5)
        for name in FILES[task] - {"gallery.png"}:
            assert (out / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("task", [pytest.param("vqa", marks=pytest.mark.slow), "nlvr2"])
def test_ranks_and_stages_train_alike(task: str, tuned) -> None:
    one = tuned(task)
    assert losses(tuned(task, 2, 2)) == pytest.approx(losses(one), rel=1e-5)
    assert digests(tuned(task, 2, 2)) == digests(one)
    assert losses(tuned(task, 2, 3)) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.slow
def test_retrieval_trains_alike_on_ranks_and_stages(tuned) -> None:
    """Without ITM, whose negatives come from a rank's own pairs."""
    one, two, three = (tuned("retrieval", *how, "loss.matching_weight=0") for how in ((1, 2), (2, 2), (2, 3)))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(three) == pytest.approx(losses(one), rel=1e-4)


def test_evaluations_disturb_no_training(tuned) -> None:
    often = tuned("vqa", 1, 2, "train.eval_every=2", "train.save_every=8")
    assert digests(often) == digests(tuned("vqa"))
    assert losses(often) == losses(tuned("vqa"))


def test_resume_goes_on_as_if_never_stopped(pretrained: Path, tuned, tmp_path: Path) -> None:
    """Stopped by kill -9 after the checkpoint at step 4; then the rest, to the bit, and the same best weights."""
    folder = tmp_path / "stopped"
    arguments = ["--task", "nlvr2", "--ds_config", "ds_configs/zero2.json", f"checkpoint={pretrained}", *FEW]
    arguments += ["train.save_every=4", f"output_dir={folder}"]
    assert program("launch/finetune.py", *arguments, before=partial(dying, 6), check=False).returncode == -9
    assert (folder / "checkpoints/latest").read_text() == "step_00000004"
    program("launch/finetune.py", *arguments, "--resume")
    whole = tuned("nlvr2")
    assert losses(folder) == losses(whole)
    assert results(folder) == results(whole)
    assert json.loads((folder / "best.json").read_text()) == json.loads((whole / "best.json").read_text())


def test_zero_shot_retrieval_is_the_same_command_without_fine_tuning(pretrained: Path, tmp_path: Path) -> None:
    few = ["data.scenes.eval_count=12", "retrieval.rerank=4", "retrieval.gallery=0"]
    program("launch/evaluate.py", "--task", "retrieval", f"checkpoint={pretrained}", f"output_dir={tmp_path}", *few)
    found = results(tmp_path)
    assert {"text_to_image_R@1", "image_to_text_R@10", "mean_recall", "reranked_mean_recall"} <= found.keys()


def test_a_larger_resolution_interpolates_the_positions(pretrained: Path, tmp_path: Path) -> None:
    line = ["--task", "nlvr2", "--ds_config", "ds_configs/zero2.json", f"checkpoint={pretrained}", *FEW]
    program("launch/finetune.py", *line, f"output_dir={tmp_path / 'run'}", "model.image_size=96", "train.steps=2")
    assert "position embeddings interpolated from 3 × 3 patches to 6 × 6" in (tmp_path / "run/start.txt").read_text()
    program("launch/evaluate.py", f"checkpoint={tmp_path / 'run'}", f"output_dir={tmp_path / 'looked'}")
    assert results(tmp_path / "looked") == pytest.approx(results(tmp_path / "run"), abs=1e-6)


def test_predictions_are_in_the_official_formats(tuned) -> None:
    answers = json.loads((tuned("vqa") / "predictions.json").read_text())
    assert all(each.keys() == {"question_id", "answer"} for each in answers)
    rows = list(csv.reader((tuned("nlvr2") / "predictions.csv").open()))
    assert {verdict for _, verdict in rows} <= {"True", "False"}
    assert len(rows) == 23 // 2
