"""Fine-tuning and evaluation on the official files, and what is said where something is wrong with them."""

import json
import re
import shutil
from pathlib import Path

import downstream_files
import pytest
from documented import assert_documented, said
from saved import saved_run
from starting import program

from sacl_ds.config.finetune import TASKS
from sacl_ds.telemetry.records import read

FILES = ["data.source=files", "train.global_batch_size=4", "train.steps=4", "train.log_every=1", "train.eval_every=4",
         "optim.warmup_steps=0", "evaluation.batch_size=5", "retrieval.rerank=3", "data.workers=0"]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("base") / "run", seed=3, teacher=False)


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    return getattr(downstream_files, request.param)(tmp_path)


def tune(pretrained: Path, task: str, folder: Path, *arguments: str, check: bool = True):
    line = ["--task", task, "--ds_config", "ds_configs/zero2.json", f"checkpoint={pretrained}", *FILES]
    return program("launch/finetune.py", *line, f"output_dir={folder / 'run'}", *arguments, check=check)


@pytest.mark.parametrize(("task", "settings"), [(task, task) for task in TASKS], indirect=["settings"])
def test_official_files_from_training_to_predictions(
    task: str, settings: list[str], pretrained: Path, tmp_path: Path
) -> None:
    """With crops, mirroring and RandAugment; the test splits of VQA and NLVR2 have no labels."""
    done = tune(pretrained, task, tmp_path, *settings)
    folder = tmp_path / "run"
    found = json.loads((folder / "results.json").read_text())
    assert found["split"] == "test"
    evaluated = [line["evaluation"] for line in read(folder / "metrics.jsonl") if "evaluation" in line]
    if task == "retrieval":
        assert found["figures"]["text_to_image_R@1"]["value"] <= 1
        assert len((folder / "rankings.jsonl").read_text().splitlines()) == 7 * 4 + 7
        return
    assert evaluated[-1]["accuracy"] <= 1
    assert found["figures"] == {}
    assert any("no label" in note for note in found["notes"])
    assert any("no label" in line for line in done.stdout.splitlines())
    if task == "vqa":
        asked = json.loads((tmp_path / "test_questions.json").read_text())["questions"]
        predicted = json.loads((folder / "predictions.json").read_text())
        answers = set(json.loads((folder / "answers.json").read_text())["answers"])
        assert [each["question_id"] for each in predicted] == [each["question_id"] for each in asked]
        assert {each["answer"] for each in predicted} <= answers
    else:
        assert len((folder / "predictions.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize("settings", ["vqa"], indirect=True)
def test_missing_images_are_counted_named_and_limited(settings: list[str], pretrained: Path, tmp_path: Path) -> None:
    """One of 24 training images and one of 8 to look at are gone: 4 of 96 and 4 of 32 questions."""
    for name in ("train2014/COCO_train2014_000000005003.jpg", "val2014/COCO_val2014_000000006002.jpg"):
        (tmp_path / "images" / name).unlink()
    refused = said(tune(pretrained, "vqa", tmp_path, *settings, "train.eval_every=1", check=False), tmp_path)
    assert refused.count("no file ") == 3  # three are named
    assert_documented(re.sub(r"no file .*?;", "no file ...;", refused))
    shutil.rmtree(tmp_path / "run")
    done = tune(
        pretrained, "vqa", tmp_path, *settings, "data.max_bad_share=0.2", "train.steps=24", "vqa.test_questions=null"
    )
    assert "4 of 32 examples cannot be used: image 6002" in done.stdout
    assert "another sample stands in for image 5003: no file" in done.stdout
    lines = read(tmp_path / "run/metrics.jsonl")
    assert [line["bad_samples"] for line in lines if "bad_samples" in line][-1] == 4  # an epoch: each question once
    assert json.loads((tmp_path / "run/results.json").read_text())["notes"][0].startswith("4 of 32 examples")


@pytest.mark.parametrize("settings", ["vqa"], indirect=True)
def test_what_nobody_answered_is_told(settings: list[str], pretrained: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(["2", "3"]))
    tune(pretrained, "vqa", tmp_path, *settings, f"vqa.answers={answers}", "vqa.test_questions=null")
    notes = json.loads((tmp_path / "run/results.json").read_text())["notes"]
    assert any("nobody gave an answer of the list, so they are lost: image 6000, question" in note for note in notes)


MISTAKES = {
    "nothing to train on": ("vqa", []),
    "no folder of images": ("nlvr2", ["nlvr2.train={here}/train.json"]),
    "no such folder": ("nlvr2", ["nlvr2.train={here}/train.json", "data.images={here}/nowhere"]),
    "malformed line": ("nlvr2", ["nlvr2.train={here}/broken.json", "data.images={here}"]),
    "malformed JSON": ("retrieval", ["retrieval.annotations={here}/broken.json", "data.images={here}"]),
    "no labels to choose by": (
        "nlvr2",
        ["nlvr2.train={here}/train.json", "nlvr2.val={here}/test.json", "data.images={here}"],
    ),
    "questions without annotations": ("vqa", ["vqa.train_questions={here}/q.json", "data.images={here}"]),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(mistake: tuple[str, list[str]], pretrained: Path, tmp_path: Path) -> None:
    """Each as a row of docs/lab/mistakes.md says."""
    downstream_files.nlvr2(tmp_path)
    (tmp_path / "broken.json").write_text('{"identifier": "a-1-2-3", "sentence": "x"}\n{"identifier": \n')
    task, arguments = mistake
    done = tune(pretrained, task, tmp_path, *(each.format(here=tmp_path) for each in arguments), check=False)
    assert_documented(said(done, tmp_path))
