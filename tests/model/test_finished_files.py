"""Files of finished runs and exports are read as they were written, or refused by name: one bit is enough."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from documented import assert_documented
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import is_one_line
from saved import saved_run

import sacl_ds
from sacl_ds.analysis.patches import load_selecting
from sacl_ds.analysis.subject import load_subject, read_pairs
from sacl_ds.checksums import FILE, require_unchanged, seal
from sacl_ds.config import ModelConfig
from sacl_ds.config_file import load_config
from sacl_ds.data.batch import View
from sacl_ds.data.scene_source import SceneSource
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import Tokenizer
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.evaluation.held_out import held_out_evaluator
from sacl_ds.exporting import export
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import load_model, seal_run
from sacl_ds.model.starts.start import load_starts, tokenizer_source, with_positions
from sacl_ds.model.teacher import load_teacher
from sacl_ds.tasks.configuration import evaluation_config, finetune_config
from sacl_ds.tasks.evaluate import evaluate
from sacl_ds.tasks.kinds import task_of
from sacl_ds.tasks.vqa import ANSWERS
from sacl_ds.tasks.weights import starting_model, task_tokenizer

CPU = torch.device("cpu")
RUN_FILES = ("config.yaml", "model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", FILE)
TOWER_FILES = ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", FILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its teacher, and both of its exports."""
    made = tmp_path_factory.mktemp("finished")
    run = saved_run(made / "run", 1)
    for each in (run / "teacher", run):
        seal_run(each)
    for form in ("hf", "safetensors"):
        export(str(run), form, made / form)
    return made


def starts(path: Path) -> None:
    """As model.start, in the order in which a run does it."""
    run = load_config(path.parent.parent / "run/config.yaml", [])
    settings = with_positions(run.model.model_copy(update={"start": str(path)}))
    source = tokenizer_source(settings)
    assert source
    tokenizer = Tokenizer.load(source[0], settings.max_tokens, source[1])
    load_starts(SaclModel(settings, tokenizer.size, pretrained=True), settings)


def fine_tunes(path: Path) -> None:
    asked = finetune_config("retrieval", None, [f"checkpoint={path}"])
    tokenizer = task_tokenizer(asked)
    assert tokenizer
    starting_model(asked, tokenizer, resume=False)


def is_evaluated(path: Path) -> None:
    few = ["data.scenes.eval_count=8", f"output_dir={path.parent / 'evaluation'}"]
    evaluate(evaluation_config("retrieval", None, [f"checkpoint={path}", *few]), CPU)


def is_exported(path: Path) -> None:
    shutil.rmtree(path.parent / "again", ignore_errors=True)
    export(str(path), "safetensors", path.parent / "again")


def starts_an_image_encoder(path: Path) -> None:
    said = json.loads((path.parent.parent / "hf/config.json").read_text())["vision_config"]
    sizes = {"embed_dim": said["hidden_size"], "depth": said["num_hidden_layers"], "patch_size": said["patch_size"],
             "num_heads": said["num_attention_heads"], "pre_norm": True, "act_layer": said["hidden_act"]}  # fmt: skip
    values = {
        "image_encoder": "vit_base_patch16_clip_224",
        "image_encoder_arguments": sizes,
        "image_weights": str(path),
    }
    model = ModelConfig.model_validate({**values, "image_weights": str(path), "image_size": said["image_size"]})
    load_starts(SaclModel(model, 50, pretrained=True), model)


OF_RUNS: dict[str, Callable[[Path], object]] = {
    "sacl_ds.load": lambda path: sacl_ds.load(path, "cpu"),
    "teacher": lambda path: load_teacher(str(path), CPU),
    "start": starts,
    "checkpoint": fine_tunes,
    "evaluation": is_evaluated,
    "export": is_exported,
    "tools": lambda path: load_subject(path, "none"),
    "patches": lambda path: load_selecting(path, ["placement=tower", "layers=[1]"]),
}
OF_TOWERS: dict[str, Callable[[Path], object]] = {
    "teacher": lambda path: load_teacher(str(path), CPU),
    "image_weights": starts_an_image_encoder,
}
CASES = [
    *[("run", name, read, RUN_FILES) for name, read in OF_RUNS.items()],
    *[("safetensors", name, read, RUN_FILES) for name, read in OF_RUNS.items() if name != "patches"],
    *[("hf", name, read, TOWER_FILES) for name, read in OF_TOWERS.items()],
]


@pytest.mark.parametrize(("source", "read", "files"), [pytest.param(s, r, f, id=f"{n} of {s}") for s, n, r, f in CASES])
def test_one_bit(source: str, read: Callable[[Path], object], files: tuple[str, ...], folder: Path) -> None:
    """Anywhere in any file: one line that names it; and where none has changed, none."""
    path = folder / "copy" / source
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder / source, path, ignore=shutil.ignore_patterns("teacher"))
    if not (source == "hf" and read is starts_an_image_encoder):  # a plain tower: the export has been made wider
        read(path)

    @settings(max_examples=2 * len(files))
    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
    def check(name: str, place: float, bit: int) -> None:
        whole = (path / name).read_bytes()
        damaged = bytearray(whole)
        damaged[int(place * len(whole))] ^= 1 << bit
        (path / name).write_bytes(damaged)
        try:
            with pytest.raises(UserError) as error:
                read(path)
            assert is_one_line(error.value)
            assert Path(name).name in str(error.value)
        finally:
            (path / name).write_bytes(whole)

    check()


def test_the_kept_teacher(folder: Path, tmp_path: Path) -> None:
    """What the tools read beside the run, and a run that is resumed."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    assert load_subject(run).teacher is not None
    words = run / "teacher/tokenizer/tokenizer.json"
    said = json.loads(words.read_text())
    vocabulary = said["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    words.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"tokenizer/tokenizer\.json: its checksum is not that of its manifest"):
        load_subject(run)


def test_what_has_no_manifest_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    """A run that was made before there was one, and one whose settings its owner has changed."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("seed: 1", "seed: 2"))
    with pytest.raises(UserError, match=rf"config\.yaml: .*, if you changed that file yourself, remove {FILE}$"):
        load_model(run, "RUN")
    (run / FILE).unlink()
    assert load_model(run, "RUN")[1].seed == 2


def test_files_that_are_gone_or_lead_elsewhere(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    (run / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer/tokenizer_config\.json: No such file"):
        load_model(run, "RUN")
    said = json.loads((run / FILE).read_text())
    said["files"] = {"../outside": said["files"]["config.yaml"]}
    (run / FILE).write_text(json.dumps(said))
    with pytest.raises(UserError, match=rf"{FILE} cannot be read: it is not as it was written"):
        require_unchanged(run, "RUN")
    assert {"config.yaml", "model.safetensors"} < json.loads((folder / "run" / FILE).read_text())["files"].keys()


def test_the_answers_of_vqa(tmp_path: Path) -> None:
    task = task_of(finetune_config("vqa", None, []))
    (tmp_path / ANSWERS).write_text(json.dumps({"answers": ["red", "two"], "most_frequent": {"": "red"}}))
    seal(tmp_path, task.kept)
    task.take(tmp_path)
    (tmp_path / ANSWERS).write_text(json.dumps({"answers": ["red", "ten"], "most_frequent": {"": "red"}}))
    with pytest.raises(UserError, match=r"answers\.json: its checksum is not that of its manifest"):
        task.take(tmp_path)


@pytest.mark.parametrize("part", ["image_projection", "text_projection"])
def test_features_that_are_not_finite_are_not_judged(part: str, folder: Path) -> None:
    model, run, tokenizer = load_model(folder / "run", "RUN")
    judge = held_out_evaluator(run)
    assert judge
    view = View(CanonicalView(run.model.image_size), tokenizer)
    with torch.no_grad():
        getattr(model, part).weight[3, 2] = float("nan")
    kind = part.partition("_")[0]
    with pytest.raises(UserError, match=rf"{kind} features of .* examples are not finite, those of '") as error:
        judge(model.eval(), view, CPU)
    assert is_one_line(error.value)
    if part == "image_projection":
        assert_documented(f"error: {error.value}")
    subject = load_subject(folder / "run")
    assert subject.teacher is not None
    subject.teacher.model.image_projection.weight.data[0, 0] = float("inf")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="teacher features of 4 of 4 examples are not finite"):
        read_pairs(subject, SceneSource(Scenes(4, 0)), None)
