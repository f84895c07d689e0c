"""Checkpoints as they lie on the disk: what is written reads back to the bit, and what is damaged is never taken."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from safetensors.torch import load_file

from sacl_ds.errors import UserError
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
from sacl_ds.training.retention import Retention
from sacl_ds.training.saved_checkpoint import read_checkpoint
from sacl_ds.training.tensor_files import Entry, Fragments, Written, checksum, fragment_name, write_entries

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
KEPT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)  # of tmp_path, overwritten


def one_line(error: UserError) -> bool:
    return len(str(error).splitlines()) == 1 and str(error).isprintable()


# -- which stay


@dataclass(frozen=True)
class Saved:
    step: int
    figures: dict[str, float] = field(default_factory=dict)


FIGURES = st.dictionaries(st.sampled_from(["R@1", "mAP"]), st.floats(allow_infinity=True, allow_nan=True))
SAVED = st.lists(st.builds(Saved, st.integers(0, 200), FIGURES), max_size=12, unique_by=lambda each: each.step)
NUMBER = st.none() | st.integers(1, 15)
KEEPS = st.builds(Retention, NUMBER, NUMBER, st.none() | st.sampled_from(["R@1", "loss"]))


@settings(max_examples=500)
@given(SAVED, KEEPS)
def test_which_checkpoints_stay(saved: list[Saved], keep: Retention) -> None:
    """One by one: it stays if fewer than n are newer, or at a multiple, or where none has a better figure, nor an equal
    one earlier; a figure that is no number is none."""

    def judged(each: Saved) -> bool:
        return keep.best in each.figures and each.figures[keep.best] == each.figures[keep.best]

    def stays(each: Saved) -> bool:
        newer = sum(other.step > each.step for other in saved)
        better = [
            other
            for other in filter(judged, saved)
            if judged(each) and (other.figures[keep.best], -other.step) > (each.figures[keep.best], -each.step)  # type: ignore[index]
        ]
        return (
            keep.newest is None
            or newer < keep.newest
            or (keep.every is not None and each.step % keep.every == 0)
            or (judged(each) and not better)
        )

    assert keep.superseded([*saved]) == {each.step for each in saved if not stays(each)}
    if saved:
        assert max(each.step for each in saved) not in keep.superseded([*saved])


@settings(max_examples=300)
@given(SAVED, KEEPS, st.integers(1, 10))
def test_what_goes_is_gone_for_good(saved: list[Saved], keep: Retention, more: int) -> None:
    """Asked again it names none of those that stayed; and none goes that a longer memory would not let go."""
    gone = keep.superseded([*saved])
    assert keep.superseded([each for each in saved if each.step not in gone]) == set()
    longer = Retention(keep.newest and keep.newest + more, keep.every, keep.best)
    assert longer.superseded([*saved]) <= gone


# -- files of tensors


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any type and shape, any bits in it."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))).view(shape)
    size = count * dtype.itemsize
    bits = torch.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    made = bits.view(dtype).view(shape)
    return made.mT if draw(st.booleans()) and made.dim() > 1 else made  # as it may lie in memory


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@KEPT
@given(st.dictionaries(NAMES, tensors(), max_size=6))
def test_tensors_read_back_to_the_bit(tmp_path: Path, wanted: dict[str, torch.Tensor]) -> None:
    """By the library; and size and checksum are those of the file."""
    file = tmp_path / "x.safetensors"
    written = write_entries(file, [Entry.of(name, tensor) for name, tensor in wanted.items()])
    content = file.read_bytes()
    assert written == Written(len(content), hashlib.sha256(content).hexdigest()) == checksum(file)
    found = load_file(file)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)


def test_an_entry_that_is_not_as_announced(tmp_path: Path) -> None:
    entry = Entry("x", torch.float32, (3,), lambda: torch.zeros(4))
    with pytest.raises(ValueError, match="announced as"):
        write_entries(tmp_path / "x", [entry])


@st.composite
def in_pieces(draw: st.DrawFn) -> tuple[dict[tuple[str, str], torch.Tensor], list[tuple[str, str, int, int, int]]]:
    """Parameters, and pieces that cover each of them once: (kind, name, start, end, file)."""
    whole, pieces = {}, []
    for number, name in enumerate(draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))):
        for kind in draw(st.sampled_from([["weight"], ["weight", "exp_avg"]])):
            size = draw(st.integers(0, 30))
            whole[kind, name] = torch.arange(size, dtype=torch.float32) + 1000 * number
            cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=6))})
            files = st.integers(0, 3)
            pieces += [(kind, name, a, b, draw(files)) for a, b in itertools.pairwise(cuts)]
    return whole, draw(st.permutations(pieces))


@KEPT
@given(in_pieces(), st.data())
def test_any_range_of_any_pieces(tmp_path: Path, made: Any, data: st.DataObject) -> None:
    whole, pieces = made
    lost = data.draw(st.sampled_from([None, *pieces]))
    paths = []
    for number in range(4):
        own = [(k, n, a, b) for k, n, a, b, file in pieces if file == number and (k, n, a, b, file) != lost]
        paths.append(tmp_path / f"rank_{number}.safetensors")
        write_entries(paths[-1], [Entry.of(fragment_name(k, n, a), whole[k, n][a:b]) for k, n, a, b in own])
    found = Fragments(paths)
    for (kind, name), tensor in whole.items():
        start = data.draw(st.integers(0, len(tensor)))
        count = data.draw(st.integers(0, len(tensor) - start))
        if lost and lost[:2] == (kind, name) and count and start < lost[3] and lost[2] < start + count:
            with pytest.raises(UserError, match=f"lacks {kind} {max(start, lost[2])} to {start + count} of ") as raised:
                found.read(kind, name, start, count)
            assert one_line(raised.value)
        else:
            assert torch.equal(found.read(kind, name, start, count), tensor[start : start + count])
            if not lost:
                assert torch.equal(found.whole(kind, {name: (1, len(tensor))})[name], tensor[None])
    assert not found.holds("weight", "a name that is too long")


# -- state and manifest

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
        assert one_line(error)
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
        assert one_line(error)


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
        assert one_line(error)


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
    assert one_line(raised.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "x\0", "x\ny", "\ud800"])
def test_a_manifest_that_names_what_is_not_its_own(step_30: Path, name: str) -> None:
    Manifest({name: Written(0, "")}, {}).save(step_30)
    with pytest.raises(UserError, match="is not a file of it") as raised:
        read_manifest(step_30)
    assert one_line(raised.value)


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
            assert one_line(error)
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


# -- a real one, damaged


def whole_run(rank: int, base: Path) -> None:
    from test_checkpoint_stages import IDENTITY, engine_of, steps, weights_of

    from sacl_ds.training import checkpoint

    engine = engine_of(2, 1, seed=0)
    steps(engine, rank, 1, range(2))
    checkpoint.save(engine, base, 2, IDENTITY)
    torch.save(weights_of(engine), base / "expected.pt")
    engine.destroy()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("real") / "run"
    on_ranks(1, whole_run, base)
    return base


def truncate(content: bytes, g: random.Random) -> bytes:
    return content[: g.randrange(len(content))]


def flip(content: bytes, g: random.Random) -> bytes:
    place = g.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << g.randrange(8))]) + content[place + 1 :]


def flip_near_the_start(content: bytes, g: random.Random) -> bytes:
    return flip(content[:200], g) + content[200:]


def lengthen(content: bytes, g: random.Random) -> bytes:
    return content + g.randbytes(g.randrange(1, 100))


def of_another(content: bytes, g: random.Random) -> bytes:
    return g.randbytes(len(content))


DAMAGES: list[Callable[[bytes, random.Random], bytes] | None] = [
    truncate, flip, flip, flip_near_the_start, lengthen, of_another, None,
]  # fmt: skip


def damaged(real: Path, copy: Path, g: random.Random) -> str:
    """A copy of a run with one file of its checkpoint damaged, or gone; which, and how."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(real, copy)
    file = g.choice(sorted(path for path in (copy / "checkpoints").rglob("*") if path.is_file()))
    damage = g.choice(DAMAGES)
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes(), g))
    return f"{file.name} {damage.__name__ if damage else 'removed'}"


def test_what_is_read_of_a_damaged_checkpoint(real: Path, tmp_path: Path) -> None:
    """The weights as they were saved, or one line; never others."""
    expected = torch.load(real / "expected.pt", weights_only=True)
    g, refused = random.Random(4), 0
    for _ in range(150):
        how = damaged(real, tmp_path / "copy", g)
        try:
            weights, state = read_checkpoint(tmp_path / "copy/checkpoints/step_00000002")
        except UserError as error:
            refused += 1
            assert one_line(error), how
        else:
            assert state.step == 2, how
            assert weights.keys() == expected.keys(), how
            assert all(torch.equal(weights[name], value) for name, value in expected.items()), how
            assert how.startswith(("latest ", "manifest.json flip", "manifest.json lengthen")), how
    assert refused > 50


def resume_damaged(rank: int, real: Path, folder: Path) -> None:
    from test_checkpoint_stages import IDENTITY, engine_of, steps, weights_of

    from sacl_ds.training import checkpoint

    expected = torch.load(real / "expected.pt", weights_only=True)
    engine = engine_of(2, 1, seed=7)
    g, refused, resumed = random.Random(5), 0, 0
    for number in range(80):
        how = damaged(real, folder / "copy", g)
        before = weights_of(engine)
        try:
            done, note = checkpoint.resume(engine, folder / "copy", IDENTITY)
        except UserError as error:
            refused += 1
            assert one_line(error), how
            after = weights_of(engine)
            assert all(torch.equal(after[name], value) for name, value in before.items()), how
        else:
            resumed += 1
            assert (done, note) == (2, None), how
            after = weights_of(engine)
            assert all(torch.equal(after[name], value) for name, value in expected.items()), how
            steps(engine, rank, 1, range(number, number + 1))  # to other weights
    (folder / "counts.json").write_text(json.dumps([refused, resumed]))
    engine.destroy()


def test_what_is_resumed_of_a_damaged_checkpoint(real: Path, tmp_path: Path) -> None:
    """The weights as they were saved, or one line and the engine as it was."""
    on_ranks(1, resume_damaged, real, tmp_path)
    refused, resumed = json.loads((tmp_path / "counts.json").read_text())
    assert refused > 30
    assert resumed > 3


def save_beside_damage(rank: int, run: Path) -> None:
    from test_checkpoint_stages import IDENTITY, engine_of, steps

    from sacl_ds.training import checkpoint

    engine = engine_of(0, 1, seed=0)
    for step in range(1, 5):
        steps(engine, rank, 1, range(step, step + 1))
        checkpoint.save(engine, run, step, IDENTITY, keep=Retention(newest=2))
        if step == 1:
            (run / "checkpoints/step_00000001/state.json").write_text("{")
        if step == 2:
            (run / "checkpoints/step_00000002/state.json").unlink()
    engine.destroy()


def test_a_damaged_one_stands_in_no_later_ones_way(tmp_path: Path) -> None:
    """Nothing is known of it, so it stays, and those behind it are saved and superseded as ever."""
    on_ranks(1, save_beside_damage, tmp_path)
    lying = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert lying == ["latest", "step_00000001", "step_00000002", "step_00000003", "step_00000004"]
    state = latest(tmp_path)
    assert state is not None
    assert state.step == 4
