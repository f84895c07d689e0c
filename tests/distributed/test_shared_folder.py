"""Ranks that write to one folder, and ranks that only seem to."""

import re
from pathlib import Path

import pytest
from documented import assert_documented
from ranks import on_ranks

from sacl_ds.errors import UserError
from sacl_ds.training.run_folder import require_shared


def own_folder(rank: int, base: Path) -> None:
    """As on nodes that each have a disk at that path: each rank looks into its own folder."""
    (base / str(rank)).mkdir()
    with pytest.raises(UserError) as raised:
        require_shared(base / str(rank), seconds=0.3)
    (base / f"said{rank}").write_text(str(raised.value))


def one_folder(rank: int, base: Path) -> None:
    require_shared(base)


def no_folder(rank: int, base: Path) -> None:
    with pytest.raises(UserError, match="cannot be written to: No such file or directory"):
        require_shared(base / "absent")


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    """Both ranks say the same, and nothing stays behind."""
    on_ranks(2, own_folder, tmp_path)
    first, second = ((tmp_path / f"said{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith(f"output_dir={tmp_path}/0 is not one folder on all nodes: rank 1 on ")
    assert not list((tmp_path / "0").iterdir())
    shown = re.sub(r"rank (\d) on \S+", lambda m: f"rank {m[1]} on node{int(m[1]) + 1}", first)
    assert_documented(f"error: {shown}".replace(str(tmp_path / "0"), "/data/run"))


def test_a_folder_that_is_shared(tmp_path: Path) -> None:
    on_ranks(2, one_folder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    on_ranks(2, no_folder, tmp_path)
    assert not list(tmp_path.iterdir())
