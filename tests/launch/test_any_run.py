"""Whatever a run directory holds: a model, a report, an evaluation, or one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import torch
from attacks import records_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save_file
from saved import saved_run

from sacl_ds.analysis.pairs import Pairs
from sacl_ds.analysis.report.building import write_report
from sacl_ds.analysis.report.sections import recorded
from sacl_ds.analysis.subject import load_subject
from sacl_ds.config import ModelConfig
from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.grouping import Grouping
from sacl_ds.data.order import Place
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import Sample
from sacl_ds.data.teacher_features import FeatureFolder, FeatureReader, ShardFeatures
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError, one_line
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import load_model
from sacl_ds.model.starts.weights_file import WeightsFile, read_weights
from sacl_ds.tasks.configuration import evaluation_config, saved_state
from sacl_ds.tasks.finetune import Best
from sacl_ds.telemetry.records import DIRECTIONS, FIGURES, LOWEST, MetricLog, read, read_figures, read_lowest

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SOAK = settings(QUICK, max_examples=3000)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8)


def assert_line(error: UserError) -> None:
    assert str(error) == one_line(str(error))
    assert 0 < len(str(error)) < 2000


def mutated(data: bytes, places: list[tuple[float, int]], most: int | None = None) -> bytes:
    """most: the changes fall on so many bytes from the front, where headers are."""
    made, length = bytearray(data), min(most or len(data), len(data))
    for place, value in places:
        made[min(int(place * length), length - 1)] = value
    return bytes(made)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved_run(tmp_path_factory.mktemp("any") / "run", 3, teacher=False)
    records_of(folder, "")
    log = [{"step": 1, "loss": 2.0, "duplicate_pairs": 0}, {"step": 2, "pmi_positive": 1.0, "pmi_negative": -1.0}]
    log += [{"step": 2, "evaluation": {"text_to_image_mAP": 0.5}, "chance": {"text_to_image_mAP": 0.1}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def check_weights(copy: Path, run: Path, places: list, most: int | None, end: float) -> None:
    data = mutated((run / "model.safetensors").read_bytes(), places, most)
    (copy / "model.safetensors").write_bytes(data[: max(1, round(end * len(data)))])
    for load, kind in (
        (lambda: load_model(copy, "run")[0], SaclModel),
        (lambda: load_subject(copy).model, SaclModel),
        (lambda: saved_state(str(copy))[0], dict),
        (lambda: read_weights(str(copy / "model.safetensors"), "model.start"), WeightsFile),
    ):
        try:
            assert isinstance(load(), kind)
        except UserError as error:
            assert_line(error)


weights = given(changes, st.sampled_from([None, 8, 16, 300, 3000]), st.floats(0, 1) | st.just(1.0))


@weights
@settings(QUICK, max_examples=20)
def test_mutated_weights(copy: Path, run: Path, places: list, most: int | None, end: float) -> None:
    check_weights(copy, run, places, most, end)


@pytest.mark.soak
@weights
@settings(SOAK, max_examples=600)
def test_many_mutated_weights(copy: Path, run: Path, places: list, most: int | None, end: float) -> None:
    check_weights(copy, run, places, most, end)


@given(st.binary(max_size=200), st.sampled_from(["w.pt", "w.safetensors", "w.bin"]), st.binary(max_size=9))
@QUICK
def test_any_bytes_as_weights(tmp_path: Path, data: bytes, name: str, start: bytes) -> None:
    for head in (b"", start, b"\x80\x02", b"PK\x03\x04"):
        (tmp_path / name).write_bytes(head + data)
        try:
            assert isinstance(read_weights(str(tmp_path / name), "x"), WeightsFile)
        except UserError as error:
            assert_line(error)


@given(changes, st.booleans())
@QUICK
def test_mutated_files_of_torch_save(tmp_path: Path, places: list, zipped: bool) -> None:
    kept = tmp_path / "kept.pt"
    if not (tmp_path / f"{zipped}").exists():
        torch.save({"model": {"w": torch.ones(3), "b": torch.zeros(2)}}, kept, _use_new_zipfile_serialization=zipped)
        kept.rename(tmp_path / f"{zipped}")
    (tmp_path / "w.pt").write_bytes(mutated((tmp_path / f"{zipped}").read_bytes(), places))
    try:
        assert isinstance(read_weights(str(tmp_path / "w.pt"), "x"), WeightsFile)
    except UserError as error:
        assert_line(error)


@given(changes)
@QUICK
def test_mutated_tokenizers(copy: Path, run: Path, places: list) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = (run / "tokenizer" / name).read_bytes()
        (copy / "tokenizer" / name).write_bytes(mutated(data, places))
        try:
            assert Tokenizer.load(copy / "tokenizer", 16).size > 0
        except UserError as error:
            assert_line(error)


@given(st.dictionaries(st.sampled_from(sorted(ModelConfig.model_fields)), json_values, max_size=2))
@settings(QUICK, max_examples=40)
def test_any_room_model(copy: Path, run: Path, room: dict[str, Any]) -> None:
    """What a model is built from, where a builder's own checks are the only ones."""
    import yaml

    saved = yaml.safe_load((run / "config.yaml").read_text())
    small = {key: value for key, value in room.items() if not (isinstance(value, int) and abs(value) > 1000)}
    saved["model"] |= {
        key: value for key, value in small.items() if key not in ("image_encoder", "text_encoder", "start")
    }
    (copy / "config.yaml").write_text(yaml.safe_dump(saved))
    for load, kind in (
        (lambda: load_model(copy, "run")[0], SaclModel),
        (lambda: evaluation_config("retrieval", None, [f"checkpoint={copy}"]), FinetuneConfig),
    ):
        try:
            assert isinstance(load(), kind)
        except UserError as error:
            assert_line(error)


lines = st.dictionaries(
    st.sampled_from(["step", "duplicate_pairs", "evaluation", "chance", "caution", "pmi_positive", "infonce_bound"]),
    json_values,
) | st.fixed_dictionaries({"step": st.integers()}, optional={"duplicate_pairs": json_values, "evaluation": json_values})


@given(st.lists(lines | json_values, max_size=4), st.binary(max_size=20))
@QUICK
def test_any_log(copy: Path, found: list[Any], rest: bytes) -> None:
    log = copy / "metrics.jsonl"
    log.write_bytes("".join(json.dumps(line) + "\n" for line in found).encode() + rest)
    for look in (read, lambda path: recorded(path.parent), lambda path: MetricLog(path, 5).close() or True):
        try:
            assert look(log) is not None
        except UserError as error:
            assert_line(error)


@given(st.lists(lines, max_size=3))
@settings(QUICK, max_examples=12)
def test_reports_of_any_log(copy: Path, found: list[Any]) -> None:
    (copy / "model.safetensors").unlink(missing_ok=True)  # without the parts that take a model
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    try:
        assert "</html>" in write_report(copy, copy / "report").read_text()
    except UserError as error:
        assert_line(error)


cells = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "double": st.floats(),
    "string": st.text(max_size=12) | st.sampled_from([*DIRECTIONS, "1-99999999999999", "/etc/passwd", "@/etc/passwd"]),
}


def column(kind: str) -> st.SearchStrategy:
    inner = cells.get(
        kind.removeprefix("list<").partition("element: ")[2].rstrip(">")
        or kind.rsplit("item: ", maxsplit=1)[-1].rstrip(">")
    )
    if kind.startswith("list"):
        assert inner is not None
        return st.lists(inner, max_size=3)
    return cells[kind] | st.none()


@pytest.mark.slow
@given(st.data())
@settings(QUICK, max_examples=40)
def test_any_records(copy: Path, run: Path, data: st.DataObject) -> None:
    """Of the right columns with any values, and with some columns of another type."""
    for name, schema, look in (("figures", FIGURES, read_figures), ("lowest", LOWEST, read_lowest)):
        path = copy / f"weights/{name}_00000005.parquet"
        table = parquet.read_table(run / f"weights/{name}_00000005.parquet")
        for number in data.draw(st.lists(st.integers(0, len(schema) - 1), max_size=3)):
            field = schema.field(number)
            values = [data.draw(column(str(field.type))) for _ in range(table.num_rows)]
            table = table.set_column(number, field.name, arrow.array(values, field.type))
        if data.draw(st.integers(0, 9)) == 0:
            table = table.drop_columns([data.draw(st.sampled_from(table.schema.names))])
        parquet.write_table(table, path)
        try:
            assert look(copy) is not None
        except UserError as error:
            assert_line(error)
    (copy / "model.safetensors").unlink(missing_ok=True)
    try:
        assert "</html>" in write_report(copy, copy / "report").read_text()
    except UserError as error:
        assert_line(error)


@given(json_values | st.fixed_dictionaries({"step": json_values, "value": json_values, "figure": st.just("mAP")}))
@QUICK
def test_any_best(copy: Path, kept: Any) -> None:
    (copy / "best.json").write_text(json.dumps(kept))
    try:
        best = Best(copy, "mAP", 100)
        assert best.step <= 100
        assert not np.isnan(best.value)
    except UserError as error:
        assert_line(error)


def pairs() -> Pairs:
    unit = np.eye(4, dtype=np.float32)
    texts = [str(number) for number in range(4)]
    return Pairs(texts, texts, texts, unit, unit, None, None, np.arange(4)[:, None], 10.0)


@given(changes, st.sampled_from(["features.safetensors", "features.json"]))
@QUICK
def test_mutated_features(tmp_path: Path, places: list, name: str) -> None:
    folder = tmp_path / "features"
    pairs().save(folder)
    (folder / "checksums.json").unlink()
    (folder / name).write_bytes(mutated((folder / name).read_bytes(), places))
    try:
        found = Pairs.load(folder)
        assert found.image.shape[0] == len(found) == 4
    except UserError as error:
        assert_line(error)


@given(changes)
@QUICK
def test_mutated_features_of_a_teacher(tmp_path: Path, places: list) -> None:
    picture = Picture(torch.zeros(3, 4, 4, dtype=torch.uint8))
    made = Sample("0", picture, ["a", "b"], [0, 1], b"")
    folder = FeatureFolder(str(tmp_path), "f" * 64)
    unit = np.ones(3, np.float16)
    path = folder.path("0.tar")
    ShardFeatures([unit, unit], [unit] * 4, [2, 2], [made.fingerprint] * 2).save(path, folder.identity)
    path.write_bytes(mutated(path.read_bytes(), places))
    try:
        assert FeatureReader(folder, ["0.tar"]).of(Place(0, 0, 1), made, 1).shape == (2, 3)
    except UserError as error:
        assert_line(error)


@given(st.binary(max_size=80), st.sampled_from(["parquet", "csv"]))
@QUICK
def test_any_bytes_as_grouping(tmp_path: Path, data: bytes, ending: str) -> None:
    path = tmp_path / f"g.{ending}"
    for start in (b"", b"key,group\n", b"PAR1"):
        path.write_bytes(start + data)
        try:
            assert isinstance(Grouping.load(path), Grouping)
        except UserError as error:
            assert_line(error)


def test_a_damaged_run_is_still_read_where_it_is_whole(run: Path, tmp_path: Path) -> None:
    """The fixture that is mutated does work as it stands: else every trial would end at its start."""
    assert isinstance(load_model(run, "run")[0], SaclModel)
    assert "</html>" in write_report(run, tmp_path / "out").read_text()
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors does not fit its config\.yaml"):
        shutil.copytree(run, tmp_path / "run")
        shutil.copy(tmp_path / "model.safetensors", tmp_path / "run")
        load_model(tmp_path / "run", "run")
