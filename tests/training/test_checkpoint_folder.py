"""State, manifest and names of checkpoints: what is damaged or leads elsewhere is never taken."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lines import is_one_line

from sacl_ds.errors import UserError
from sacl_ds.files import Written
from sacl_ds.training.checkpoint_folder import (
    Manifest,
    RunState,
    complete,
    latest,
    read_manifest,
    read_state,
    remove,
    state_json,
    sweep,
    verify,
)

KEPT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)  # of tmp_path, overwritten


STATE = RunState(
    30, 2, 3, "words", "order", 29, 7, {"scale": 1.5}, {"alpha": 0.5}, {"R@1": 0.25}, {"torch": "2"}, "abc"
)
MANIFEST = Manifest({"rank_00000.safetensors": Written(8, "0" * 64), "a/b": Written(0, "1" * 64)}, {"x.weight": (3, 4)})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)

ANYTHING = st.binary(max_size=100) | JSON.map(lambda x: json.dumps(x).encode())


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes of it others, or missing, or doubled; or cut short."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(found)))
        found[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(found[: draw(st.integers(0, len(found)))] if draw(st.booleans()) else found)


def written_manifest(folder: Path) -> bytes:
    MANIFEST.save(folder)
    return (folder / "manifest.json").read_bytes()


@pytest.fixture
def step_30(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000030"
    folder.mkdir()
    return folder


@KEPT
@given(
    content=st.binary(max_size=100) | JSON.map(lambda x: json.dumps(x).encode()) | mutated(state_json(STATE).encode())
)
def test_a_state_of_any_content(step_30: Path, content: bytes) -> None:
    """A state, of the right types, or one line."""
    (step_30 / "state.json").write_bytes(content)
    try:
        state = read_state(step_30)
    except UserError as error:
        assert is_one_line(error)
        assert str(step_30) in str(error)
    else:
        assert state.step == 30
        for name, value in asdict(STATE).items():
            assert type(getattr(state, name)) is type(value), name
        assert all(isinstance(x, int | float) for x in (state.figures | state.loss_scale | state.schedules).values())


@KEPT
@given(key=st.sampled_from(sorted(asdict(STATE))), value=JSON)
def test_a_state_with_any_value(step_30: Path, key: str, value: Any) -> None:
    (step_30 / "state.json").write_text(json.dumps({**asdict(STATE), key: value}))
    try:
        assert json.dumps(getattr(read_state(step_30), key)) == json.dumps(value)
    except UserError as error:
        assert is_one_line(error)


def test_a_state_that_is_written_reads_back(step_30: Path) -> None:
    (step_30 / "state.json").write_text(state_json(STATE))
    assert read_state(step_30) == STATE
    for missing in (step_30 / "not", step_30 / "state.json"):
        with pytest.raises(FileNotFoundError):
            read_state(missing)


@KEPT
@given(data=st.data())
def test_a_manifest_of_any_content(step_30: Path, data: st.DataObject) -> None:
    """What was written, or one line: no mutation passes."""
    good = written_manifest(step_30)
    assert read_manifest(step_30) == MANIFEST
    content = data.draw(ANYTHING | mutated(good))
    (step_30 / "manifest.json").write_bytes(content)
    try:
        assert read_manifest(step_30) == MANIFEST
    except UserError as error:
        assert is_one_line(error)


@KEPT
@given(key=st.sampled_from(["files", "shapes"]), value=JSON | st.dictionaries(st.text(max_size=9), JSON, max_size=2))
def test_a_manifest_by_another_hand(step_30: Path, key: str, value: Any) -> None:
    """One whose checksum is right: whatever it says, reading by it gives one line."""
    values = {**{name: json.loads(json.dumps(x)) for name, x in asdict(MANIFEST).items()}, key: value}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (step_30 / "manifest.json").write_text(json.dumps({**values, "sha256": digest}))
    with pytest.raises(UserError) as raised:
        manifest = read_manifest(step_30)
        assume(manifest.files)  # a checkpoint of nothing is whole
        verify(step_30, sorted(manifest.files), manifest)
    assert is_one_line(raised.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "x\0", "x\ny", "\ud800"])
def test_a_manifest_that_names_what_is_not_its_own(step_30: Path, name: str) -> None:
    Manifest({name: Written(0, "")}, {}).save(step_30)
    with pytest.raises(UserError, match="is not a file of it") as raised:
        read_manifest(step_30)
    assert is_one_line(raised.value)


@pytest.mark.parametrize("shape", [(-1,), (2**62, 4), (1.0,), (True,), ("3",)])
def test_a_manifest_with_shapes_that_are_none(step_30: Path, shape: tuple[Any, ...]) -> None:
    Manifest({}, {"x": shape}).save(step_30)
    with pytest.raises(UserError, match="'x' cannot be of shape"):
        read_manifest(step_30)


# -- which is the newest


def lay(run: Path, *steps: int) -> Path:
    """Checkpoints, as far as `latest` looks."""
    for step in steps:
        folder = run / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(state_json(RunState(step, 1, 0, "words")))
        Manifest({}, {}).save(folder)
    return run / "checkpoints"


ELSEWHERE = ["../../elsewhere/checkpoints/step_00000099", "../../elsewhere", "..", ".", "/", "~", "", "\n", "\0"]


@KEPT
@given(content=st.binary(max_size=60) | st.text().map(lambda x: x.encode("utf-8", "surrogatepass")))
def test_whatever_latest_holds(tmp_path: Path, content: bytes) -> None:
    if not (tmp_path / "run").exists():
        lay(tmp_path / "run", 10, 20)
    (tmp_path / "run/checkpoints/latest").write_bytes(content)
    state = latest(tmp_path / "run")
    assert state is not None
    assert state.step == (10 if content.strip() == b"step_00000010" else 20)


def test_latest_never_leads_elsewhere(tmp_path: Path) -> None:
    lay(tmp_path / "elsewhere", 99)
    checkpoints = lay(tmp_path / "run", 10, 20)
    absolute = str(tmp_path / "elsewhere/checkpoints/step_00000099")
    inside = ["step_00000010/../step_00000099", "step_00000010/../../../elsewhere/checkpoints/step_00000099"]
    for content in [*ELSEWHERE, absolute, *inside, "step_" + "9" * 100_000, "x" * (1 << 22), "step_٠٠٠٠٠٠١٠"]:
        (checkpoints / "latest").write_text(content)
        try:
            state = latest(tmp_path / "run")
        except UserError as error:
            assert content.startswith("step_999")  # longer than a name can be
            assert is_one_line(error)
        else:
            assert state is not None
            assert state.step == 20, content[:80]
    (checkpoints / "latest").write_text("step_00000010\n")
    assert latest(tmp_path / "run") == RunState(10, 1, 0, "words")
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").mkdir()
    assert latest(tmp_path / "run") == RunState(20, 1, 0, "words")


def test_what_kills_leave_behind(tmp_path: Path) -> None:
    """Is not taken for a checkpoint, and swept; a folder under another name, or without all of it, is none either."""
    checkpoints = lay(tmp_path / "run", 10)
    others = ["step_50", "step_000000060", "step_٠٠٠٠٠٠٧٠", "x"]
    for name in (".step_00000030.writing", ".step_00000040.removing", *others):
        shutil.copytree(checkpoints / "step_00000010", checkpoints / name)
    (checkpoints / "step_00000080").mkdir()  # nothing in it
    (checkpoints / ".latest.writing").write_text("step_0")
    assert complete(checkpoints) == [checkpoints / "step_00000010"]
    assert latest(tmp_path / "run") == RunState(10, 1, 0, "words")
    sweep(checkpoints)
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {"step_00000010", "step_00000080", *others}


def test_a_checkpoint_that_is_removed_is_out_of_sight_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it cannot be removed whole, that ends no run: the next sweep goes on."""
    checkpoints = lay(tmp_path / "run", 10, 20)
    with monkeypatch.context() as patched:
        patched.setattr("os.rmdir", _refuse)
        remove(checkpoints / "step_00000020")
    assert [path.name for path in complete(checkpoints)] == ["step_00000010"]
    sweep(checkpoints)
    assert {path.name for path in checkpoints.iterdir()} == {"step_00000010"}


def _refuse(*path: Any, **settings: Any) -> None:
    raise OSError(39, "Directory not empty")
