"""Shards that are damaged, gone, or on a server that misbehaves: what is read, what stands in, what is said."""

import os
import re
import signal
import tarfile
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import psutil
import pytest
from serving import Server, serving
from tars import batches, global_keys, loader, sample, write_tar, write_tars

from sacl_ds.data.batch import Batch
from sacl_ds.data.order import Block, Place
from sacl_ds.data.shards import index, reading
from sacl_ds.data.shards import opening as shard_cache
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.opening import Heart, ShardCache, open_shard
from sacl_ds.data.shards.patterns import stats_path
from sacl_ds.data.shards.reading import ShardReading
from sacl_ds.data.shards.source import ReadAhead
from sacl_ds.errors import UserError

SIZES = (15, 20, 12)
STEPS = 47  # of 4: four epochs


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(reading, "_PAUSES", (0.05,))
    monkeypatch.setattr(index, "_PAUSE", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def served(tmp_path: Path):
    """A server of three shards with their counts beside them."""
    write_tars(tmp_path, SIZES)
    for number, size in enumerate(SIZES):
        stats_path(tmp_path / f"{number}.tar").write_text(f'{{"successes": {size}}}')
    with serving(tmp_path) as server:
        yield server


def keys(parts: list[Batch]) -> list[list[str]]:
    return [batch.keys for batch in parts]


def faults(parts: list[Batch]) -> Counter[tuple[str, str, str]]:
    """(shard's name, key, reason): how often."""
    return Counter((Path(f.shard).name, f.key, f.reason) for batch in parts for f in batch.faults)


def differences(before: list[list[str]], after: list[list[str]]) -> list[tuple[str, str]]:
    """What stands in each slot that holds another sample than before."""
    slots = zip([key for batch in before for key in batch], [key for batch in after for key in batch], strict=True)
    return [(was, now) for was, now in slots if was != now]


def in_the_first_half(path: Path) -> int:
    """Samples that end there."""
    middle = path.stat().st_size // 2 // 512 * 512
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar if member.name.endswith("txt")]
    return sum(end <= middle for end in ends)


def pattern(server: Server) -> str:
    return f"{server.url}/{{0..2}}.tar"


def test_over_http_as_from_disk(served: Server) -> None:
    expected = keys(batches(f"{served.folder}/{{0..2}}.tar", STEPS, batch=4))
    assert keys(batches(pattern(served), STEPS, batch=4)) == expected
    assert global_keys(pattern(served), 12, 2, workers=2, batch=4) == expected[:12]


def test_counts_of_remote_shards(served: Server) -> None:
    assert index_shards(pattern(served)).counts == list(SIZES)
    assert served.asked["1.tar"] == 0
    stats_path(served.folder / "1.tar").unlink()
    os.environ["XDG_CACHE_HOME"] += "/another"
    assert index_shards(pattern(served)).counts == list(SIZES)
    assert served.asked["1.tar"] == 1


def test_gaps_on_a_server(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which says that it has no such shard; one that fails in another way is no gap."""
    monkeypatch.setattr(index, "_ATTEMPTS", 1)
    stats_path(served.folder / "1.tar").unlink()
    (served.folder / "1.tar").unlink()
    found = index_shards(pattern(served), allow_missing=1)
    assert (found.counts, found.missing) == ([SIZES[0], SIZES[2]], [f"{served.url}/1.tar"])
    os.environ["XDG_CACHE_HOME"] += "/another"
    with pytest.raises(UserError, match=r"1\.tar has no stats beside it and cannot be scanned: .*404"):
        index_shards(pattern(served))
    stats_path(served.folder / "0.tar").unlink()
    served.faults["0.tar"] = "500", 100
    with pytest.raises(UserError, match=r"0\.tar has no stats beside it and cannot be scanned: .*500"):
        index_shards(pattern(served), allow_missing=2)


@pytest.mark.parametrize("fault", ["500", "reset", "short", "cut", "garbage", "stall", "gone"])
def test_what_passes_is_tried_again(served: Server, fault: str) -> None:
    """Once wrong, then right: the same batches, nothing replaced."""
    expected = keys(batches(f"{served.folder}/{{0..2}}.tar", 12, batch=4))
    served.faults["1.tar"] = fault, 1
    found = batches(pattern(served), 12, batch=4, streams=1, stall_seconds=0.6)
    plain = batches(f"{served.folder}/{{0..2}}.tar", 12, batch=4, streams=1)
    assert keys(found) == keys(plain)
    assert not faults(found)
    assert served.faults["1.tar"] == (fault, 0)
    assert expected != keys(plain)  # another number of streams is another order


REASONS = {
    "500": "curl: (22) The requested URL returned error: 500",
    "gone": "curl: (22) The requested URL returned error: 404",
    "reset": "curl: (56)",
    "short": "curl: (18)",
    "cut": "fewer than its index says",
    "garbage": "",
    "stall": "it gave nothing for 0.6 s",
}


@pytest.mark.parametrize("fault", REASONS)
def test_what_does_not_pass_is_replaced_and_named(served: Server, fault: str) -> None:
    """Shard 1 fails for good: its samples, or those behind the fault, are replaced; all others stay where they were."""
    expected = keys(batches(f"{served.folder}/{{0..2}}.tar", STEPS, batch=4, streams=1))
    served.faults["1.tar"] = fault, 10_000
    limit, attempts = (0.6, 1) if fault == "stall" else (60, 2)  # silence is waited for in each epoch
    found = batches(pattern(served), STEPS, batch=4, streams=1, stall_seconds=limit, attempts=attempts)
    lost = faults(found)
    ours = {sample(number)[0] for number in range(15, 35)}
    assert {shard for shard, _, _ in lost} == {"1.tar"}
    assert {reason for _, _, reason in lost if REASONS[fault] not in reason} == set()
    changed = [
        (a, b) for was, now in zip(expected, keys(found), strict=True) for a, b in zip(was, now, strict=True) if a != b
    ]
    assert {a for a, _ in changed} <= ours
    read = {a for was in expected for a in was if a in ours} - {a for a, _ in changed}
    assert sum(lost.values()) == len(changed) == 4 * (20 - len(read))
    # of a half that came all is used, but for the sample in which it ends and the one before, which may not be whole
    came = 0 if fault in ("500", "gone", "garbage") else in_the_first_half(served.folder / "1.tar")
    assert len(read) in ({0} if not came else {came - 1, came})
    assert not {b for _, b in changed} & (ours - read)


@pytest.mark.parametrize("fault", ["500", "short"])
def test_what_stands_in_for_a_shard_is_the_same_everywhere(served: Server, fault: str) -> None:
    served.faults["1.tar"] = fault, 10_000
    options = {"batch": 4, "streams": 2, "attempts": 1}
    expected = global_keys(pattern(served), 14, 1, **options)
    assert global_keys(pattern(served), 14, 2, workers=2, **options) == expected


@pytest.mark.parametrize("damage", ["cut", "vanished", "overwritten"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    there = write_tars(tmp_path, SIZES)
    expected = keys(batches(there, STEPS, batch=4, streams=1))
    ready = loader(there, batch=4, streams=1)  # counted while it was whole
    path = tmp_path / "1.tar"
    whole, whole_before = path.read_bytes(), in_the_first_half(path)
    if damage == "vanished":
        path.unlink()
    else:
        middle = len(whole) // 2 // 512 * 512
        path.write_bytes(whole[:middle] + (b"" if damage == "cut" else b"\xaa" * (len(whole) - middle)))
    steps = iter(ready)
    found = [next(steps) for _ in range(STEPS)]
    lost = faults(found)
    assert {shard for shard, _, _ in lost} == {"1.tar"}
    changed = [
        (a, b) for was, now in zip(expected, keys(found), strict=True) for a, b in zip(was, now, strict=True) if a != b
    ]
    assert sum(lost.values()) == len(changed)
    came = 0 if damage == "vanished" else whole_before
    assert len(changed) in ({80} if not came else {4 * (20 - came), 4 * (21 - came)})
    reason = "No such file" if damage == "vanished" else "fewer than its index says|unexpected end of data|bad checksum"
    assert [said for _, _, said in lost if not re.search(reason, said)] == []


def test_a_source_that_cannot_be_broken_off_ends_the_run(tmp_path: Path) -> None:
    """A file system that hangs: here a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "0.tar")

    class Hanging:
        heart = Heart()
        shard = str(tmp_path / "0.tar")

        def __iter__(self):
            with open(self.shard, "rb") as file:
                yield file.read(1)

    began = time.monotonic()
    with pytest.raises(UserError, match=r"0\.tar has given nothing for \d+ s .data\.stall_seconds=0\.5.; look at"):
        next(ReadAhead(Hanging(), 0.5))
    assert time.monotonic() - began < 5


def test_slow_use_is_no_stall(tmp_path: Path) -> None:
    steps = iter(loader(write_tars(tmp_path, [90]), batch=4, streams=1, stall_seconds=0.2))
    for _ in range(3):
        assert not next(steps).faults
        time.sleep(0.45)


def test_pipes_and_what_fsspec_opens(tmp_path: Path) -> None:
    local = str(write_tar(tmp_path / "0.tar", map(sample, range(30))))
    expected = keys(batches(local, 10))
    assert keys(batches(f"pipe:cat {local}", 10)) == expected
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(local, "0.tar")
    assert keys(batches(f"zip://0.tar::{tmp_path}/x.zip", 10)) == expected
    with pytest.raises(UserError, match=r"cannot be scanned: "):
        batches(f"pipe:head -c 9000 {local}; exit 3", 3)
    with pytest.raises(UserError, match=r"nonsense://x/0\.tar cannot be opened: Protocol not known"):
        batches("nonsense://x/0.tar", 1)


def test_a_pipe_that_does_not_end_is_no_trouble(tmp_path: Path) -> None:
    """Left before its end, a command is ended, not waited for."""
    path = write_tar(tmp_path / "0.tar", map(sample, range(30)))
    began = time.monotonic()
    with open_shard(f"pipe:cat {path}; sleep 60") as stream:
        assert stream.read(512)
    assert time.monotonic() - began < 5


def kept_in(folder: Path, size: int) -> ShardCache:
    cache = ShardCache.of(str(folder), size / 1e9)
    assert cache is not None
    return cache


def test_a_cache_that_cannot_be_written_to() -> None:
    with pytest.raises(UserError, match=r"data\.cache_dir=/dev/null/x cannot be written to: Not a directory"):
        ShardCache.of("/dev/null/x", 1)


def test_the_cache_fetches_once(served: Server, tmp_path: Path) -> None:
    expected = keys(batches(f"{served.folder}/{{0..2}}.tar", STEPS, batch=4))
    options = {"batch": 4, "cache_dir": str(tmp_path / "kept"), "workers": 3}
    assert keys(batches(pattern(served), STEPS, **options)) == expected
    assert {name: served.asked[name] for name in ("0.tar", "1.tar", "2.tar")} == {"0.tar": 1, "1.tar": 1, "2.tar": 1}
    assert keys(batches(pattern(served), STEPS, **options)) == expected
    assert served.asked["1.tar"] == 1
    assert not list((tmp_path / "kept").glob("*.partial"))


@pytest.mark.parametrize("fault", ["stall", "garbage", "cut", "short"])
def test_the_cache_keeps_no_fault(served: Server, tmp_path: Path, fault: str) -> None:
    """What came damaged is fetched anew, and a server that falls silent is broken off while it is fetched from."""
    served.faults["1.tar"] = fault, 1
    found = batches(pattern(served), 12, batch=4, streams=1, cache_dir=str(tmp_path / "kept"), stall_seconds=0.6)
    assert keys(found) == keys(batches(f"{served.folder}/{{0..2}}.tar", 12, batch=4, streams=1))
    assert not faults(found)


def test_silent_streams_are_broken_off_together(served: Server) -> None:
    """Not one after the other: eight streams of a server that says nothing cost the time of one."""
    for name in ("0.tar", "1.tar", "2.tar"):
        served.faults[name] = "stall", 2
    began = time.monotonic()
    batches(pattern(served), 1, batch=8, streams=8, stall_seconds=0.6, attempts=4)
    assert time.monotonic() - began < 4


def running_children() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


def test_what_is_closed_leaves_nothing_behind(served: Server) -> None:
    """Neither processes nor threads, though the server is silent."""
    before = running_children()
    served.faults["0.tar"] = "stall", 10
    reading = ShardReading([f"{served.url}/0.tar"], iter([Block([Place(0, 0, 14)], [0])]), 3, 60, None)
    ahead = ReadAhead(reading, 60)
    until = time.monotonic() + 10
    while running_children() == before and time.monotonic() < until:
        time.sleep(0.05)
    assert running_children() > before
    ahead.close()
    while (left := running_children() - before) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


def test_counting_is_broken_off_too(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index.open_shard, "__defaults__", (None, 0.5))
    served.faults["0_stats.json"] = served.faults["2_stats.json"] = "stall", 1
    assert index_shards(pattern(served)).counts == list(SIZES)
    os.environ["XDG_CACHE_HOME"] += "/another"
    served.faults["0_stats.json"] = "gone", 100
    served.faults["0.tar"] = "500", 100
    with pytest.raises(UserError, match=r"0\.tar has no stats beside it and cannot be scanned: curl: \(22\)"):
        index_shards(pattern(served))


def test_the_cache_keeps_within_its_size(served: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "_ROOM_EVERY", 1)
    monkeypatch.setattr(shard_cache, "_DOWNLOADED_AT_ONCE", 1024)
    sizes = {n: (served.folder / f"{n}.tar").stat().st_size for n in range(3)}
    cache = kept_in(tmp_path / "kept", sizes[0] + sizes[1] + 2048)

    def read(number: int) -> bytes:
        with cache.open(f"{served.url}/{number}.tar", Heart()) as stream:
            return stream.read()

    def kept() -> set[str]:
        return {path.name[-5:] for path in (tmp_path / "kept").glob("*.tar")}

    for number in (0, 1, 0):
        assert read(number) == (served.folder / f"{number}.tar").read_bytes()
        time.sleep(0.02)
    assert kept() == {"0.tar", "1.tar"}
    read(2)
    assert kept() == {"0.tar", "2.tar"}  # 1 was not used for longest
    assert sum(path.stat().st_size for path in (tmp_path / "kept").iterdir()) <= cache.limit
    small = kept_in(tmp_path / "small", 5000)
    with small.open(f"{served.url}/1.tar", Heart()) as stream:
        assert stream.read() == (served.folder / "1.tar").read_bytes()
    assert not list((tmp_path / "small").glob("*.tar"))


def test_the_cache_goes_on_after_a_fetch_that_was_killed(served: Server, tmp_path: Path) -> None:
    """The lock goes with its process; what it left is written anew."""
    cache = kept_in(tmp_path / "kept", 10**9)
    served.faults["0.tar"] = "stall", 1
    child = os.fork()
    if not child:
        cache.fetch(f"{served.url}/0.tar", Heart())
        os._exit(1)
    until = time.monotonic() + 20
    while not list((tmp_path / "kept").glob("*.partial")) and time.monotonic() < until:
        time.sleep(0.05)
    waiting = threading.Thread(target=cache.fetch, args=(f"{served.url}/0.tar", Heart()))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    waiting.join(20)
    with cache.open(f"{served.url}/0.tar", Heart()) as stream:
        assert stream.read() == (served.folder / "0.tar").read_bytes()
    assert served.asked["0.tar"] == 2
