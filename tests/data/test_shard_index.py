"""Which shards there are and how many samples they hold."""

import os
import time
from pathlib import Path

import psutil
import pytest
from tars import sample, write_tar, write_tars

from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.patterns import expand, stats_path
from sacl_ds.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "sacl_ds"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "empty list"),
        ([], "empty list"),
        ("/nowhere/{0..3}.tar", r"/nowhere/0\.tar does not exist .and 3 more of 4."),
        ("[/a/{0..9}.tar, @b]", r"entries of a list stand in quotes: '\[\"/a/"),
        ("/a/{0..9.tar", r"braces do not match in '/a/\{0\.\.9\.tar'"),
        ("@/nowhere/list.txt", r"the list /nowhere/list\.txt cannot be read: No such file"),
    ],
)
def test_missing_shards(pattern: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(pattern)


def test_lists_and_patterns(tmp_path: Path) -> None:
    write_tars(tmp_path, [1, 1, 1])
    (tmp_path / "list.txt").write_text(f"# mine\n\n{tmp_path}/2.tar\n  {tmp_path}/{{0..1}}.tar \nhttp://there/x.tar\n")
    names = [f"{tmp_path}/{n}.tar" for n in (2, 0, 1)]
    assert expand(f"@{tmp_path}/list.txt") == [*names, "http://there/x.tar"]
    assert expand([f"{tmp_path}/2.tar", f"{tmp_path}/{{0..1}}.tar"]) == names
    with pytest.raises(UserError, match=r"1\.tar is named twice"):
        expand([f"{tmp_path}/1.tar", f"{tmp_path}/{{0..1}}.tar"])


def test_counts_by_looking_are_kept_while_the_shard_is_the_same(tmp_path: Path, cache: Path) -> None:
    pattern = write_tars(tmp_path, [3, 0, 5])
    looked: list[int] = []
    assert index_shards(pattern, done=lambda count, total: looked.append(total)).sets == [[3, 0, 5]]
    assert index_shards(pattern, done=lambda count, total: looked.append(total)).sets == [[3, 0, 5]]
    assert looked == [3]
    write_tar(tmp_path / "2.tar", map(sample, range(9)))
    os.utime(tmp_path / "0.tar", (1, 1))
    assert index_shards(pattern, done=lambda count, total: looked.append(total)).sets == [[3, 0, 9]]
    assert looked == [3, 2]
    (kept,) = cache.iterdir()
    kept.write_text("{not json")
    assert index_shards(pattern).total == 12


def test_stats_are_believed(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, [3])
    stats_path(tmp_path / "0.tar").write_text('{"successes": 1234, "count": 1300}')
    assert index_shards(pattern).counts == [1234]


def test_a_home_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert index_shards(write_tars(tmp_path, [3])).counts == [3]


def test_empty_and_unreadable_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples in 2 shards"):
        index_shards(write_tars(tmp_path, [0, 0]))
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(
        UserError, match=r"0\.tar has no stats beside it and cannot be scanned: file could not be opened"
    ):
        index_shards(str(tmp_path / "0.tar"))


def test_several_sets(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, [3, 4, 5])
    one, two = f"{tmp_path}/{{0..1}}.tar", f"{tmp_path}/2.tar"
    assert index_shards([one, two]).sets == [[3, 4, 5]] == index_shards(pattern).sets
    assert index_shards([one, two], several=True).sets == [[3, 4], [5]]


def test_ten_thousand_shards(tmp_path: Path) -> None:
    """Of 10,000 samples by their stats; the second time at once, and in little memory."""
    for number in range(10_000):
        (tmp_path / f"{number:05d}.tar").touch()
        (tmp_path / f"{number:05d}_stats.json").write_text('{"successes": 10000}')
    pattern = str(tmp_path / "{00000..09999}.tar")
    assert index_shards(pattern).total == 100_000_000
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    index = index_shards(pattern)
    seconds = time.perf_counter() - start
    order = GlobalOrder(index.sets, 4096, 0)
    assert next(order.blocks(63, 0, 150_000 * 64)).places
    assert index.total == 100_000_000
    assert seconds < 3  # a third of that where the cores are idle
    assert psutil.Process().memory_info().rss - before < 100e6


def test_shards_that_may_be_missing(tmp_path: Path) -> None:
    """As img2dataset leaves gaps: up to so many, in any set; what a run began with is what it goes on with."""
    pattern = write_tars(tmp_path, [3, 4, 5, 6])
    second, third = (tmp_path / f"{n}.tar" for n in (1, 2))
    second.rename(tmp_path / "away")
    line = r"data\.shards: shard .*1\.tar does not exist; correct .*, or leave gaps out with data\.allow_missing=1"
    with pytest.raises(UserError, match=line):
        index_shards(pattern)
    index = index_shards(pattern, allow_missing=1)
    assert (index.sets, index.missing) == ([[3, 5, 6]], [str(second)])
    assert [Path(shard).name for shard in index.shards] == ["0.tar", "2.tar", "3.tar"]
    assert index.left_out == f"1 of 4 shards are missing and left out: {second}"
    sets = [str(tmp_path / "{0..1}.tar"), str(tmp_path / "{2..3}.tar")]
    assert index_shards(sets, several=True, allow_missing=2).sets == [[3], [5, 6]]
    # it has come back
    (tmp_path / "away").rename(second)
    assert index_shards(pattern, allow_missing=1).missing == []
    assert index_shards(pattern, allow_missing=1, left_out=[str(second)]) == index
    # another has gone
    third.unlink()
    assert index_shards(pattern, allow_missing=1).missing == [str(third)]
    for settled in ([], [str(second)]):
        with pytest.raises(
            UserError, match=r"2\.tar does not exist; the run began with it: put it back, or take it out"
        ):
            index_shards(pattern, allow_missing=1, left_out=settled)
    second.unlink()
    with pytest.raises(UserError, match=r"1\.tar does not exist \(and 1 more of 4\); .*data\.allow_missing=2"):
        index_shards(pattern, allow_missing=1)
    with pytest.raises(UserError, match=r"1\.tar does not exist \(and 1 more of 2\); correct the pattern"):
        index_shards(str(tmp_path / "{1..2}.tar"), allow_missing=2)
