"""The study of patch selection: trials run once, from one start, and their figures are what they say."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from patch_study.plan import PatchPlan, read_plan
from patch_study.start import cells_of_patches
from patch_study.summary import draw_kept, speed_table, write_table
from patch_study.tasks import Pretraining, QuestionAnswering, build
from patch_study.trial import finished, run_plan, speeds, trained
from PIL import Image
from ranks import prepared
from starting import program

from sacl_ds.data.scene_language import COLOUR, COLOURS, PLACE, SHAPE, SHAPES
from sacl_ds.data.scenes import Scenes
from sacl_ds.errors import UserError

SELECTED = {"placement": "tower", "layers": [1, 2]}
TINY = {
    "sizes": {
        "width": 16, "heads": 2, "depth": 2, "text_layers": 1, "fusion_layers": 1, "scenes": 60, "held_out": 64,
        "batch": 8, "steps": {"vqa": 3, "pretrain": 2}, "start_steps": {"vqa": 2, "pretrain": 2}, "image_steps": 2,
        "image_scenes": 30, "warmup": 1,
    },
    "seeds": [0, 1],
    "arms": {
        "all": {"task": "vqa"},
        "text": {"task": "vqa", "selection": SELECTED},
        "output": {"task": "pretrain", "selection": {"placement": "output", "keep_rate": 0.49}},
        "published": {"task": "pretrain", "selection": {**SELECTED, "placement": "published"}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[PatchPlan, Path]:
    """Run once, with the trials of seed 1 in a second go."""
    prepared()
    folder = tmp_path_factory.mktemp("study")
    plan = PatchPlan.model_validate(TINY)
    ran: list[tuple[str, int]] = []
    run_plan(plan.only(None, [0]), folder, 2, lambda trial, _: ran.append(trial))
    run_plan(plan, folder, 2, lambda trial, _: ran.append(trial))
    assert sorted(ran) == sorted((name, seed) for name in plan.arms for seed in plan.seeds)
    return plan, folder


@pytest.mark.slow
def test_trials_are_kept_and_told(study: tuple[PatchPlan, Path]) -> None:
    plan, folder = study
    results = finished(plan, folder)
    assert len(results) == 8
    for (name, seed), result in results.items():
        figures = [value for value in result.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in figures)
        assert (result["arm"], result["seed"]) == (name, seed)
    one, other = (results["text", seed] for seed in (0, 1))
    assert one["accuracy"] != other["accuracy"] or one["by_kind"] != other["by_kind"]
    assert "kept_asked" not in results["all", 0]
    # 36 patches: 26, then 19 are kept
    assert 0 < one["kept_asked"] < 1
    table = write_table(plan, results, folder)
    assert (folder / "table.md").read_text() == table + "\n"
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows == ["arm", "all", "text", "arm", "output", "published"]
    with (folder / "trials.jsonl").open("a") as file:
        file.write('{"broken')
    assert finished(plan, folder) == results


@pytest.mark.slow
def test_a_trial_is_the_same_when_run_again(study: tuple[PatchPlan, Path], tmp_path: Path) -> None:
    plan, folder = study
    for kept in [*folder.glob("*.npy"), *folder.glob("start-*")]:
        (tmp_path / kept.name).symlink_to(kept)
    run_plan(plan.only(["output"], [0]), tmp_path, 2, lambda *_: None)
    again, first = (finished(plan, place)["output", 0] for place in (tmp_path, folder))
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


@pytest.mark.slow
def test_speed(study: tuple[PatchPlan, Path]) -> None:
    plan, folder = study
    took = speeds(plan, folder, rounds=2)
    assert set(took) == set(plan.arms)
    lines = speed_table(plan, took).splitlines()
    assert lines[2].startswith("| all |")
    assert lines[2].endswith("| 1.00 |")


@pytest.mark.slow
def test_what_is_asked_about(study: tuple[PatchPlan, Path]) -> None:
    """The place of the object that a question names, found again by the words alone."""
    plan, folder = study
    task = build(plan.arms["text"], plan.sizes, 0, folder)
    assert isinstance(task, QuestionAnswering)
    scenes = Scenes(plan.sizes.held_out, 1001)
    row = 0
    for index in range(len(scenes)):
        for kind, question, _ in scenes.questions(index):
            if kind not in ("colour", "texture", "place", "shape"):
                continue
            words = question.split()
            objects = scenes.scene(index).objects
            named = [thing[PLACE] for thing in objects if SHAPES[thing[SHAPE]] == words[-2]]
            if kind == "shape":
                named = [thing[PLACE] for thing in objects if COLOURS[thing[COLOUR]] == words[4]]
            assert [task.held_out.places[row]] == named
            row += 1
    assert row == len(task.held_out.answer)


@pytest.mark.slow
def test_the_picture(study: tuple[PatchPlan, Path], tmp_path: Path) -> None:
    """Two questions of each scene, about two objects."""
    plan, folder = study
    task = trained(plan, "text", 0, folder)
    assert isinstance(task, QuestionAnswering)
    draw_kept(task, "kept", tmp_path / "kept.png", 5)
    width, height = Image.open(tmp_path / "kept.png").size
    assert min(width, height) > 900  # five scenes, some of the first ten have questions about one object alone


def test_patches_lie_in_their_cells() -> None:
    sizes = PatchPlan.model_validate(TINY).sizes
    cells = cells_of_patches(sizes).view(6, 6)
    assert cells[:2, :2].unique().tolist() == [0]
    assert cells[4:, 2:4].unique().tolist() == [7]
    assert torch.bincount(cells.flatten()).tolist() == [4] * 9


@pytest.mark.slow
def test_captions_are_masked_and_matched(study: tuple[PatchPlan, Path]) -> None:
    plan, folder = study
    task = build(plan.arms["output"], plan.sizes, 0, folder)
    assert isinstance(task, Pretraining)
    batch = task.training.batch(torch.tensor([5, 9]))
    assert batch.pair_ids.tolist() == [[1], [2]]
    hidden = batch.mlm_labels != -100
    assert torch.equal(batch.input_ids[~hidden], batch.masked_ids[~hidden])
    assert torch.equal(batch.input_ids[hidden], batch.mlm_labels[hidden])
    assert torch.equal(batch.images[0], torch.from_numpy(Scenes(60, 10).image(1)).permute(2, 0, 1))


def test_bad_plans_are_one_line(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("arms: {one: {task: vqua}}")
    with pytest.raises(UserError, match=r"plan.yaml: arms.one.task: Input should be 'vqa' or 'pretrain'"):
        read_plan(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_plan(tmp_path / "none.yaml")
    shipped = read_plan(root / "launch/configs/patches_study.yaml")
    with pytest.raises(UserError, match="no arm of the plan is called 'vqa'"):
        shipped.only(["vqa"], None)
    done = program("tools/study_patches.py", "--processes", "0", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("--processes 0: at least 1")


def test_truth_values_are_no_numbers(tmp_path: Path) -> None:
    for sizes, where in (({"batch": True}, "sizes.batch"), ({"steps": {"vqa": True}}, "sizes.steps")):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"sizes": sizes, "arms": {}}))
        with pytest.raises(UserError, match=rf"plan\.yaml: {where}: Input should be a number$"):
            read_plan(tmp_path / "plan.yaml")
