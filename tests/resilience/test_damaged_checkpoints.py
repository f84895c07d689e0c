"""A checkpoint of a real engine, damaged: the right weights or one line, never other weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lines import is_one_line
from ranks import on_ranks

from sacl_ds.errors import UserError
from sacl_ds.training.checkpoint_folder import Retention, latest, read_checkpoint


def whole_run(rank: int, base: Path) -> None:
    from stages import IDENTITY, engine_of, steps, weights_of

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
            assert is_one_line(error), how
        else:
            assert state.step == 2, how
            assert weights.keys() == expected.keys(), how
            assert all(torch.equal(weights[name], value) for name, value in expected.items()), how
            assert how.startswith(("latest ", "manifest.json flip", "manifest.json lengthen")), how
    assert refused > 50


def resume_damaged(rank: int, real: Path, folder: Path) -> None:
    from stages import IDENTITY, engine_of, steps, weights_of

    from sacl_ds.training import checkpoint

    expected = torch.load(real / "expected.pt", weights_only=True)
    engine = engine_of(2, 1, seed=7)
    g, refused, resumed = random.Random(5), 0, 0
    for number in range(80):
        how = damaged(real, folder / "copy", g)
        before = weights_of(engine)
        try:
            found = checkpoint.resume(engine, folder / "copy", IDENTITY)
        except UserError as error:
            refused += 1
            assert is_one_line(error), how
            after = weights_of(engine)
            assert all(torch.equal(after[name], value) for name, value in before.items()), how
        else:
            resumed += 1
            assert (found.state.step, found.notes) == (2, []), how
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
    from stages import IDENTITY, engine_of, steps

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
