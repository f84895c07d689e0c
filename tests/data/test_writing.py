"""Shards written from streams: stopped, gone on with, broken samples left out, full disks, bounded memory."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as arrow
import pytest
import sources
from pyarrow import parquet
from sources import samples_of
from starting import ROOT

from sacl_ds.data.making.lists import table_records
from sacl_ds.data.making.record import BrokenSample, Record
from sacl_ds.data.making.writer import list_skipped, write_shards
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(count: int) -> list[Record]:
    return [Record(f"{n:09d}", [f"caption {n}"], lambda n=n: sources.image(n), {"n": n}) for n in range(count)]


def pairs(folder: Path, count: int, **odd: str) -> list[str | Path]:
    """Options for a table of `count` rows and images; odd: row number (as 'n7') -> what its caption is instead."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(sources.image(number))
    captions = [odd.get(f"n{number}", f"caption {number}") for number in range(count)]
    sources.write_table(folder / "t.csv", {"path": [f"{n}.jpg" for n in range(count)], "caption": captions})
    return ["table", "--table", folder / "t.csv", "--images", folder, "--per-shard", "10"]


def test_a_stream_of_unknown_length(tmp_path: Path) -> None:
    assert write_shards(iter(rows(25)), tmp_path / "a", 10) == (3, 0)
    assert write_shards(rows(25), tmp_path / "b", 10, total=25) == (3, 0)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert write_shards((row for row in rows(25)), tmp_path / "a", 10) == (0, 3)
    with pytest.raises(UserError, match="earlier, longer list"):
        write_shards(iter(rows(20)), tmp_path / "a", 10)


def test_tars_are_as_tarfile_writes_them(tmp_path: Path) -> None:
    """Whole records of 20 blocks, two empty blocks at the end, whatever the length."""
    for count in range(1, 12):
        write_shards(rows(count), tmp_path / str(count), 20)
        with (tmp_path / str(count) / "00000.tar").open("rb") as file:
            data = file.read()
        assert len(data) % 10240 == 0
        assert not any(data[-1024:])
        assert data[-10240 - 512 :].strip(b"\0")


def test_another_list_of_the_same_length_is_refused(tmp_path: Path) -> None:
    write_shards(rows(10), tmp_path, 10)
    other = [Record(row.key, [f"not {row.captions[0]}"], row.load, row.meta) for row in rows(10)]
    with pytest.raises(UserError, match=r"00000\.tar holds other samples"):
        write_shards(other, tmp_path, 10)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    arguments = pairs(tmp_path / "in", 300)
    tool = [sys.executable, str(ROOT / "tools/make_shards.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([*tool, "--out", str(tmp_path / "out")], env=environment, stderr=subprocess.DEVNULL)
    while killed.poll() is None and len(list((tmp_path / "out").glob("*.tar"))) < 3:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*_stats.json")}
    assert before
    done = sources.run("make_shards", *arguments, "--out", tmp_path / "out")
    assert done.stdout.startswith(f"300 samples in 30 shards under {tmp_path / 'out'} (")
    assert f"({len(before)} were there already)" in done.stdout
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == made for name, made in before.items())
    sources.run("make_shards", *arguments, "--out", tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_broken_samples_are_left_out(tmp_path: Path) -> None:
    arguments = pairs(tmp_path / "in", 40, n3="", n27="  ")
    (tmp_path / "in/12.jpg").unlink()
    (tmp_path / "in/13.jpg").write_bytes(sources.image(13)[:-10])
    (tmp_path / "in/14.jpg").write_bytes(b"<html>")
    (tmp_path / "in/15.jpg").write_bytes(sources.image(15, "gif"))
    for number in range(30, 40):
        (tmp_path / f"in/{number}.jpg").unlink()
    failed = sources.run("make_shards", *arguments, "--out", tmp_path / "out")
    error = sources.error_of(failed)
    assert "13 of 40 samples cannot be written (11 image missing, 2 no caption), first" in error
    assert "t.csv line 5: no caption" in error
    assert not (tmp_path / "out").exists()
    arguments += ["--skip-broken", "--out", tmp_path / "out"]
    done = sources.run("make_shards", *arguments)
    assert done.stdout.splitlines() == [
        f"24 samples in 4 shards under {tmp_path / 'out'} (0 were there already)",
        "left out 16 samples: 11 image missing, 3 image does not decode, 2 no caption; "
        f"see {tmp_path / 'out/skipped.jsonl'}",
    ]
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in skipped] == [f"{n:09d}" for n in (3, 12, 13, 14, 15, 27, *range(30, 40))]
    assert skipped[2]["shard"] == "00001.tar"
    assert skipped[2]["where"] == f"{tmp_path / 'in/t.csv'} line 15"
    assert "truncated" in skipped[2]["detail"]
    assert "not an image" in skipped[3]["detail"]
    assert "GIF" in skipped[4]["detail"]
    index = index_shards(str(tmp_path / "out/{00000..00003}.tar"))
    assert index.counts == [9, 6, 9, 0]
    assert len(list(samples_of(ShardSource(index)))) == 24
    # resumed in the middle, the same; without the option, refused
    whole = contents(tmp_path / "out")
    for name in ("00001.tar", "00002_stats.json", "skipped.jsonl"):
        (tmp_path / "out" / name).unlink()
    assert "(2 were there already)" in sources.run("make_shards", *arguments).stdout
    assert contents(tmp_path / "out") == whole


def test_an_empty_caption_among_others(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(sources.image(1))
    sources.write_table(tmp_path / "t.tsv", {"path": ["x.jpg"] * 3, "caption": ["one", " ", "three"]})
    arguments = ["table", "--table", tmp_path / "t.tsv", "--images", tmp_path, "--out", tmp_path / "out"]
    assert "t.tsv line 3: empty caption: number 2 of 3" in sources.error_of(sources.run("make_shards", *arguments))
    done = sources.run("make_shards", *arguments, "--skip-broken")
    assert done.stdout.splitlines()[1].startswith("left out 1 empty captions of samples that have others; see")
    (sample,) = samples_of(ShardSource(index_shards(str(tmp_path / "out/00000.tar"))))
    assert sample.captions == ["one", "three"]


def test_what_only_writing_finds(tmp_path: Path) -> None:
    """The shards before it are kept; --skip-broken then goes on, and later runs must have it too."""
    arguments = [*pairs(tmp_path / "in", 30), "--out", tmp_path / "out"]
    (tmp_path / "in/25.jpg").write_bytes(sources.image(25)[:-10])
    error = sources.error_of(sources.run("make_shards", *arguments))
    assert "t.csv line 27: image does not decode: 25.jpg image file is truncated" in error
    assert "--skip-broken" in error
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar*")) == ["00000.tar", "00001.tar"]
    assert not list((tmp_path / "out").glob(".*"))
    assert "(2 were there already)" in sources.run("make_shards", *arguments, "--skip-broken").stdout
    error = sources.error_of(sources.run("make_shards", *arguments))
    assert "00002.tar was written with --skip-broken and leaves out 1, first" in error


def test_nothing_to_write(tmp_path: Path) -> None:
    arguments = [*pairs(tmp_path / "in", 3), "--skip-broken", "--out", tmp_path / "out"]
    for number in range(3):
        (tmp_path / f"in/{number}.jpg").unlink()
    assert "3 of 3 samples cannot be written (3 image missing)" in sources.error_of(
        sources.run("make_shards", *arguments)
    )
    with pytest.raises(UserError, match="--per-shard 0"):
        write_shards(rows(3), tmp_path, 0)


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    arguments = [*pairs(tmp_path / "in", 3), "--out", tmp_path / "out"]
    free = os.statvfs(tmp_path)
    try:
        for number in range(2):
            os.truncate(tmp_path / f"in/{number}.jpg", free.f_bavail * free.f_frsize)  # sparse: takes no room
    except OSError as error:
        assert error.errno == errno.EFBIG
        pytest.skip("this file system has no files as large as itself")
    error = sources.error_of(sources.run("make_shards", *arguments))
    assert "/out: the shards need about " in error
    assert "B are free; free some space or write to another disk" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    arguments = [*pairs(tmp_path / "in", 30), "--out", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.00001.tar.writing").symlink_to("/dev/full")
    error = sources.error_of(sources.run("make_shards", *arguments))
    assert f"the disk is full: {tmp_path / 'out'} has no room for another shard; free some space and give the" in error
    assert sorted(contents(tmp_path / "out")) == ["00000.tar", "00000_stats.json"]
    assert "(1 were there already)" in sources.run("make_shards", *arguments).stdout


def test_skipped_is_gone_with_its_cause(tmp_path: Path) -> None:
    def broken() -> bytes:
        raise BrokenSample("image missing", "x")

    spoilt = rows(5)
    spoilt[2] = Record(spoilt[2].key, spoilt[2].captions, broken, spoilt[2].meta)
    write_shards(spoilt, tmp_path, 10, skip_broken=True)
    assert list_skipped(tmp_path) == {"image missing": 1}
    (tmp_path / "00000.tar").unlink()
    write_shards(rows(5), tmp_path, 10, skip_broken=True)
    assert not list_skipped(tmp_path)
    assert sorted(contents(tmp_path)) == ["00000.tar", "00000_stats.json"]


def peak_memory(folder: Path, count: int, caption: str) -> int:
    """Write `count` rows of one parquet row group; the peak of the tool's resident memory in bytes."""
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(sources.image(number))
    with parquet.ParquetWriter(
        folder / "t.parquet", arrow.schema([("path", arrow.string()), ("caption", arrow.string())])
    ) as writer:
        for start in range(0, count, 100_000):
            numbers = range(start, min(count, start + 100_000))
            columns = {"path": [f"{n % 4}.jpg" for n in numbers], "caption": [f"{n} {caption}" for n in numbers]}
            writer.write_table(arrow.table(columns))
    arguments = ["--table", folder / "t.parquet", "--images", folder, "--out", folder / "out", "--per-shard", "10000"]
    tool = [sys.executable, str(ROOT / "tools/make_shards.py"), "table", *map(str, arguments)]
    # a child starts with the peak of whoever starts it: here a small process, not this one
    starter = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    # what threads' arenas and pools happen to keep is no growth
    steady = {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **steady}
    done = subprocess.run([sys.executable, "-c", starter, *tool], env=environment, check=True, stdout=subprocess.PIPE)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """24,000 more captions of 2 kB would be 48 MB more in a list, without their records."""
    small, large = (peak_memory(tmp_path / str(n), n, "word " * 400) for n in (6_000, 30_000))
    assert large - small < 24e6
    assert large < 250e6


@pytest.mark.soak
def test_a_million_rows(tmp_path: Path) -> None:
    assert peak_memory(tmp_path / "m", 1_000_000, "caption") < 500e6
    stats = [json.loads(path.read_text()) for path in (tmp_path / "m/out").glob("*_stats.json")]
    assert sum(shard["successes"] for shard in stats) == 1_000_000
    records = table_records(tmp_path / "m/t.parquet", tmp_path / "m")
    assert write_shards(records, tmp_path / "m/out", 10_000, total=1_000_000) == (0, 100)
