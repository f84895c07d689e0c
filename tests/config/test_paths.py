"""`~` in whatever is a path: in settings, from a file and from the command line; in lists of shards; in options."""

from pathlib import Path

import pytest
import yaml
from saved import saved_run
from starting import program

import sacl_ds
from sacl_ds.command_line import evaluation_parser, training_parser
from sacl_ds.config import RunConfig
from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.config.room import expanded
from sacl_ds.config_file import read_layers, resolve_layers
from sacl_ds.data.shards.patterns import expand
from sacl_ds.errors import UserError
from sacl_ds.exporting import export

OF_PRETRAINING = [
    "output_dir", "data.grouping", "data.cache_dir", "teacher.checkpoint", "teacher.features", "model.image_encoder",
    "model.image_weights", "model.text_encoder", "model.start",
]  # fmt: skip
OF_TASKS = [
    "output_dir", "checkpoint", "data.images", "retrieval.annotations", "vqa.train_questions", "vqa.train_annotations",
    "vqa.val_questions", "vqa.val_annotations", "vqa.test_questions", "vqa.test_annotations", "vqa.visual_genome",
    "vqa.visual_genome_images", "vqa.answers", "nlvr2.train", "nlvr2.val", "nlvr2.test",
]  # fmt: skip
ALWAYS = ["data.source=shards", "data.shards=0.tar", "teacher.checkpoint=x"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("root", "key"),
    [*((RunConfig, key) for key in OF_PRETRAINING), *((FinetuneConfig, key) for key in OF_TASKS)],
)
def test_every_path_setting(root: type, key: str, home: Path) -> None:
    always = ALWAYS if root is RunConfig else ["task=vqa"]
    value: object = "~/a b"
    for part in reversed(key.split(".")):
        value = {part: value}
    (home / "run.yaml").write_text(yaml.safe_dump(value))
    typed, filed = read_layers(None, [f"{key}=~/a b"]), read_layers(home / "run.yaml", [])
    for layers in (typed, filed):
        found: object = resolve_layers(read_layers(None, always) + layers, root)
        for part in key.split("."):
            found = getattr(found, part)
        assert found == f"{home}/a b"


def test_lists_of_paths_and_what_is_none(home: Path) -> None:
    layers = read_layers(None, ["task=vqa", 'vqa.train_questions=["~/a.json", "b.json"]', "vqa.train_annotations=~"])
    run = resolve_layers(layers, FinetuneConfig)
    assert run.vqa.train_questions == [f"{home}/a.json", "b.json"]
    assert expanded("local-dir:~/vit") == f"local-dir:{home}/vit"
    assert expanded("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert expanded("a/~/b") == "a/~/b"


def test_shards(home: Path) -> None:
    (home / "x").mkdir()
    for number in range(2):
        (home / f"x/{number}.tar").touch()
    (home / "list.txt").write_text("~/x/{0..1}.tar\n")
    expected = [f"{home}/x/0.tar", f"{home}/x/1.tar"]
    for pattern in ("~/x/{0..1}.tar", "@~/list.txt", ["~/x/0.tar", "~/x/1.tar"]):
        assert expand(pattern) == expected


def test_a_tool(home: Path) -> None:
    program("tools/make_shards.py", "scenes", "--count", "3", "--out=~/shards")
    assert (home / "shards/00000.tar").is_file()


def test_options_of_training_and_evaluation(home: Path) -> None:
    for name in ("zero", "run"):
        (home / f"{name}.json").write_text("{}")
    for parser in (training_parser("", ""), evaluation_parser("", "")):
        assert parser.parse_args(["--config", "~/run.json"]).config == f"{home}/run.json"
    assert training_parser("", "").parse_args(["--ds_config=~/zero.json"]).ds_config == f"{home}/zero.json"


def test_arguments_in_python(home: Path) -> None:
    run = saved_run(home / "run", 1, teacher=False)
    assert sacl_ds.load("~/run", "cpu").image_size == sacl_ds.load(run, "cpu").image_size
    export("~/run", "safetensors", Path("~/out"))
    assert (home / "out/model.safetensors").is_file()
    with pytest.raises(UserError, match=r"--out .*out is there already"):
        export("~/run", "safetensors", Path("~/out"))
