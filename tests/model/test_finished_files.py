"""Files of finished runs and exports are read as they were written, or refused by name: one bit is enough."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from documented import assert_documented
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import is_one_line
from safetensors.numpy import load_file, save_file
from saved import saved_run
from starting import program, start
from tars import write_tars
from weight_study.cache import keep_array, keep_tensors, kept_array, kept_tensors
from weight_study.runner import keep, results

import sacl_ds
from sacl_ds.analysis.patches import load_selecting
from sacl_ds.analysis.report.sections import recorded
from sacl_ds.analysis.subject import load_subject, read_pairs
from sacl_ds.config import ModelConfig, RunConfig
from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.config_file import load_config
from sacl_ds.data.batch import View
from sacl_ds.data.grouping import Grouping
from sacl_ds.data.order import Place
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import Sample
from sacl_ds.data.scenes import Scenes, SceneSource
from sacl_ds.data.shards.index import count_samples, index_shards
from sacl_ds.data.shards.patterns import stats_path
from sacl_ds.data.teacher_features import FeatureFolder, FeatureReader, ShardFeatures
from sacl_ds.data.text import Tokenizer
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.evaluation.held_out import held_out_evaluator
from sacl_ds.exporting import export
from sacl_ds.exporting.card import read_source
from sacl_ds.files import FILE, require_unchanged, seal, unseal
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import load_model, saved_model_config, seal_run
from sacl_ds.model.starts.start import load_starts, tokenizer_source, with_positions
from sacl_ds.model.teacher import load_teacher
from sacl_ds.tasks.configuration import evaluation_config, finetune_config, saved_state, starting_model, task_tokenizer
from sacl_ds.tasks.evaluate import evaluate
from sacl_ds.tasks.finetune import Best
from sacl_ds.tasks.task import task_of
from sacl_ds.tasks.vqa.task import ANSWERS
from sacl_ds.telemetry.plots import plot_run
from sacl_ds.telemetry.records import read_figures, read_lowest
from sacl_ds.training.checkpoint_folder import read_checkpoint
from sacl_ds.training.health import BadSteps
from sacl_ds.training.run import RECORDS
from sacl_ds.training.run_folder import open_run_folder
from sacl_ds.yaml_files import plain_yaml

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


def flipped(data: bytes) -> bytes:
    """One bit in the middle."""
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@contextmanager
def one_bit(file: Path) -> Iterator[None]:
    whole = file.read_bytes()
    file.write_bytes(flipped(whole))
    try:
        yield
    finally:
        file.write_bytes(whole)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished: a pre-training run on shards of which one is missing, its teacher, and two fine-tuned from it."""
    made = tmp_path_factory.mktemp("runs")
    write_tars(made, [20, 20])
    shards = ["data.source=shards", f"data.shards={made}/{{0..2}}.tar", "data.allow_missing=1"]
    start(made / "run", *shards, "train.steps=2", "teacher.steps=1", "records.every=1")
    few = ["data.scenes.count=16", "data.scenes.eval_count=8", "train.global_batch_size=8", "train.steps=2"]
    for task in ("vqa", "retrieval"):
        line = ["--task", task, "--ds_config", "ds_configs/zero2.json", f"checkpoint={made}/run"]
        program("launch/finetune.py", *line, *few, f"output_dir={made}/{task}")
    bad = BadSteps(made / "run", 2, None)
    unseal(made / "run")
    bad.add(1, {"loss": torch.tensor(float("nan"))}, ["000001"], torch.tensor([True]))
    seal_run(made / "run", *RECORDS)
    return {"run": made / "run", "teacher": made / "run/teacher", "vqa": made / "vqa", "retrieval": made / "retrieval"}


def should_resume(run: Path) -> None:
    """As --resume begins."""
    values = plain_yaml((run / "config.yaml").read_bytes().decode(errors="replace"))
    values |= {"output_dir": str(run)}
    asked = (FinetuneConfig if "task" in values else RunConfig).model_validate(values)
    open_run_folder(asked, True)[1].close()


def exported(run: Path) -> None:
    read_source(str(run))


# files of a finished run by how their names begin, and who reads them in a run of any kind; each refuses them
READ_BY: dict[str, tuple[Callable[[Path], object], ...]] = {
    "config.yaml": (lambda run: load_config(run / "config.yaml", []), saved_model_config),
    "model.safetensors": (lambda run: saved_state(str(run)), should_resume),
    "tokenizer/": (lambda run: Tokenizer.load(run / "tokenizer", 20), should_resume),
    "metrics.jsonl": (plot_run, should_resume),
    "weights/": (read_figures, read_lowest, should_resume),
    "missing_shards.txt": (should_resume,),
    "bad_steps.jsonl": (should_resume,),
    "checkpoints/step_": (lambda run: read_checkpoint(max((run / "checkpoints").glob("step_*"))),),
    "best.json": (lambda run: Best(run, "", 2), should_resume),
    "answers.json": (lambda run: task_of(finetune_config("vqa", None, [])).take(run), should_resume),
    "checksums.json": (plot_run, lambda run: saved_state(str(run)), should_resume),
}
# and who reads them besides in runs of these kinds
BESIDES: dict[tuple[str, str], tuple[Callable[[Path], object], ...]] = {
    ("run", "metrics.jsonl"): (recorded, exported),
    ("run", "weights/"): (recorded,),
    ("retrieval", "metrics.jsonl"): (exported,),
    ("retrieval", "best.json"): (exported,),
}
# no command makes anything of these
NOT_READ = {
    ".lock": "who is at work, for the line that refuses another",
    "checkpoints/latest": "it names a checkpoint that is checked itself, from which any run comes to the same end",
    "status.json": "how it ended, for schedulers",
    "start.txt": "for people",
    "plots/": "for people",
    "gallery.png": "for people",
    "results.json": "for people, and written anew with each evaluation",
    "predictions.json": "for the benchmark's own script",
    "rankings.jsonl": "for people",
}


def test_every_file_of_a_finished_run(runs: dict[str, Path]) -> None:
    seen = set()
    for name, folder in runs.items():
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            inside = file.relative_to(folder).as_posix()
            if inside.startswith(("teacher/", *NOT_READ)):
                continue
            (kind,) = [each for each in READ_BY if inside.startswith(each)]
            seen.add(kind)
            for read in (*READ_BY[kind], *BESIDES.get((name, kind), ())):
                if read is should_resume and name == "teacher":
                    continue  # with the run that it is in
                with one_bit(file), pytest.raises(UserError) as error:
                    read(folder)
                assert is_one_line(error.value)
                assert file.name in str(error.value), (inside, str(error.value))
                if (inside, read) in (("metrics.jsonl", plot_run), ("best.json", should_resume)):
                    assert_documented(f"error: {error.value}".replace(str(folder), "/data/run"))
    assert seen == READ_BY.keys()
    for name, folder in runs.items():
        plot_run(folder)
        if name != "teacher":
            should_resume(folder)
    for file in (runs["teacher"] / "metrics.jsonl", runs["teacher"] / "config.yaml"):
        with one_bit(file), pytest.raises(UserError, match=rf"^--resume: .*/teacher: {file.name}: its checksum"):
            should_resume(runs["run"])


def test_a_finished_run_goes_on(runs: dict[str, Path]) -> None:
    """Its manifest is taken away before its files change, and written anew."""
    shards = runs["run"].parent / "{0..2}.tar"
    more = ["data.source=shards", f"data.shards={shards}", "data.allow_missing=1", "teacher.steps=1"]
    start(runs["run"], *more, "records.every=1", "train.steps=3", "--resume")
    require_unchanged(runs["run"], "RUN")
    assert {row["step"] for row in read_figures(runs["run"])} == {1, 2, 3}


def test_saved_features(folder: Path, tmp_path: Path) -> None:
    """What scan, suspects and others read in the place of a run, and the grouping that training reads."""
    features, groups = tmp_path / "features", tmp_path / "made/groups.parquet"
    weigh = ["--alpha", "0", "--sharpness", "9"]
    program("tools/weight_analysis.py", "scan", folder / "run", *weigh, "--out", tmp_path, "--save-features", features)
    line = ["suspects", features, *weigh, "--out", tmp_path / "s.parquet", "--similarity-above", "0.1"]
    program("tools/weight_analysis.py", *line, "--grouping", groups)
    Grouping.load(groups)
    files = [path for path in features.iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "features.safetensors", "samples.parquet", "features.json", "config.yaml", "checksums.json"
    }  # fmt: skip
    for file in files:
        with one_bit(file):
            done = program("tools/weight_analysis.py", *line, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert re.search(rf"^error: .*{file.name}", done.stderr)
    with one_bit(groups), pytest.raises(UserError, match=r"data\.grouping=.*: groups\.parquet: its checksum is not"):
        Grouping.load(groups)


@settings(max_examples=60)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_stored_features_of_a_teacher(tmp_path_factory: pytest.TempPathFactory, place: float, bit: int) -> None:
    """One bit anywhere: refused, or the same features, since it was not of theirs."""
    picture = Picture(torch.zeros(3, 4, 4, dtype=torch.uint8))
    made = Sample("0", picture, ["a", "b"], [0, 1], b"")
    where = FeatureFolder(str(tmp_path_factory.mktemp("t")), "f" * 64)
    rows = list(np.random.default_rng(0).standard_normal((6, 8)).astype(np.float16))
    path = where.path("0.tar")
    ShardFeatures(rows[:2], rows[2:], [2, 2], [made.fingerprint] * 2).save(path, where.identity)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = FeatureReader(where, ["0.tar"]).of(Place(0, 0, 1), made, 1)
    except UserError as error:
        assert is_one_line(error)
        assert path.name in str(error)
    else:
        np.testing.assert_array_equal(found, rows[1::4])


@pytest.mark.parametrize("part", ["image", "text", "first_text", "image_check"])
def test_a_row_of_stored_features(part: str, tmp_path: Path) -> None:
    """The row that is read, or what leads to it, in a file that is sound otherwise."""
    made = Sample("0", Picture(torch.zeros(3, 4, 4, dtype=torch.uint8)), ["a", "b"], [0, 1], b"")
    where = FeatureFolder(str(tmp_path), "f" * 64)
    rows = list(np.random.default_rng(0).standard_normal((3, 8)).astype(np.float16))
    path = where.path("0.tar")
    ShardFeatures(rows[:1], rows[1:], [2], [made.fingerprint]).save(path, where.identity)
    tensors = load_file(path)
    tensors[part].view(np.uint8).reshape(-1)[0] ^= 1
    save_file(tensors, path, metadata={"teacher": where.identity})
    with pytest.raises(UserError, match=r"is damaged \(the features of 0 are not as they were written\)"):
        FeatureReader(where, ["0.tar"]).of(Place(0, 0, 0), made, 0)


def test_counts_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept ones and those beside a shard: taken as if they were not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program("tools/make_shards.py", "scenes", "--count", "20", "--out", tmp_path / "shards", "--per-shard", "20")
    (shard,) = map(str, (tmp_path / "shards").glob("*.tar"))
    assert index_shards(shard).counts == [20]
    for file in (*(tmp_path / "cache/sacl_ds").iterdir(), Path(stats_path(shard))):
        said = file.read_text()
        assert "20" in said
        file.write_text(said.replace("20", "21"))
    assert index_shards(shard).counts == [20]
    Path(stats_path(shard)).write_text('{"successes": 19}')  # of another maker
    assert count_samples(shard) == 19


def test_trials_of_a_study(tmp_path: Path) -> None:
    trials = tmp_path / "trials.jsonl"
    for number in range(2):
        with trials.open("a") as file:
            file.write('{"broken off": ')
        keep({"fingerprint": str(number), "mAP": 0.25}, trials)
    assert results(trials) == {name: {"fingerprint": name, "mAP": 0.25} for name in ("0", "1")}
    trials.write_text(trials.read_text().replace("0.25", "0.75", 1))
    with pytest.raises(UserError, match=r"trials\.jsonl: line 1 is no result of a trial as it was written; remove it"):
        results(trials)
    keep_array(np.arange(9), tmp_path / "cache/tokens.npy")
    keep_tensors({"weight": torch.ones(9)}, tmp_path / "cache/stem.safetensors")
    np.testing.assert_array_equal(kept_array(tmp_path / "cache/tokens.npy"), np.arange(9))
    for name, read in (("tokens.npy", kept_array), ("stem.safetensors", kept_tensors)):
        file = tmp_path / "cache" / name
        with one_bit(file), pytest.raises(UserError, match=rf"cache: {name}: its checksum is not that of its manifest"):
            read(file)
