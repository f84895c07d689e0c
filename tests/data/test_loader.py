"""What a global batch holds: the same at any number of ranks and workers, from any step, with every kind of sample."""

import contextlib
import io
import os
import tarfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from tars import batches, global_keys, jpeg, loader, sample, write_tar, write_tars
from webdataset import TarWriter

from sacl_ds.data.batch import Batch, duplicates
from sacl_ds.data.shards.opening import Heart, Stream, open_shard
from sacl_ds.data.shards.tars import samples_of, start_of
from sacl_ds.errors import UserError

UNEVEN = (11, 1, 0, 35)  # fewer shards than workers, and one that is empty


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tars(tmp_path_factory.mktemp("uneven"), UNEVEN)


@cache
def whole(pattern: str) -> tuple[Batch, ...]:
    return tuple(batches(pattern, 200))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_the_first_global_batches(uneven: str, world: int, workers: int) -> None:
    """200, or, of loaders whose processes have each to be started and heard, 24: six epochs."""
    steps = 24 if workers else 200
    assert global_keys(uneven, steps, world, workers=workers) == [batch.keys for batch in whole(uneven)[:steps]]


@pytest.mark.slow
def test_the_first_200_global_batches(uneven: str) -> None:
    assert global_keys(uneven, 200, 4, workers=3) == [batch.keys for batch in whole(uneven)]


def test_crops_captions_and_masks_are_the_same_too(uneven: str) -> None:
    parts = [batches(uneven, 12, rank=rank, world=3, workers=2) for rank in range(3)]
    for step, expected in enumerate(whole(uneven)[:12]):
        for name in ("images", "pair_ids"):
            assert torch.equal(torch.cat([getattr(part[step], name) for part in parts]), getattr(expected, name))
        for name in ("input_ids", "masked_ids", "mlm_labels"):
            rows = [row for part in parts for row in getattr(part[step], name)]
            width = min(map(len, rows))
            assert torch.equal(torch.stack([row[:width] for row in rows]), getattr(expected, name)[:, :width])


def test_every_sample_exactly_once_an_epoch(uneven: str) -> None:
    """Three epochs of 47 end within a batch: it is filled from the fourth."""
    keys = [key for batch in whole(uneven)[:12] for key in batch.keys]
    for epochs in (1, 2, 3):
        # streams end an epoch within a step of each other
        served = Counter(keys[: epochs * 47 // 12 * 12 + 12])
        assert set(served) == {sample(number)[0] for number in range(47)}
        assert all(epochs - 1 <= times <= epochs + 1 for times in served.values())
    assert Counter(key for batch in batches(uneven, 47, batch=4) for key in batch.keys) == {
        sample(number)[0]: 4 for number in range(47)
    }


@pytest.mark.parametrize("start", [1, 7, 133])
def test_any_step_is_a_start(uneven: str, start: int) -> None:
    rest = batches(uneven, 9, start=start, workers=2)
    expected = whole(uneven)[start : start + 9]
    assert [batch.keys for batch in rest] == [batch.keys for batch in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, expected, strict=True))


def test_a_start_far_into_a_large_shard_takes_no_time(tmp_path: Path) -> None:
    """2,000 samples of 200 kB: to read 400 MB would take longer."""
    noise = torch.randint(0, 256, (200_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padding = noise.numpy().tobytes()
    samples = ((key, fields | {"bin": padding}) for key, fields in map(sample, range(2000)))
    pattern = str(write_tar(tmp_path / "0.tar", samples))
    batches(pattern, 1)  # counts
    began = time.perf_counter()
    (batch,) = batches(pattern, 1, batch=1, start=1990, streams=1)
    assert time.perf_counter() - began < 1
    assert batch.keys == batches(pattern, 1991, batch=1, streams=1)[-1].keys


def test_long_names_and_compressed_tars(tmp_path: Path) -> None:
    """Places in these are found by reading from the front."""
    samples = [("folder/" * 30 + f"{key}", fields) for key, fields in map(sample, range(40))]
    plain = write_tar(tmp_path / "0.tar", samples)
    zipped = tmp_path / "1.tar.gz"
    zipped.write_bytes(__import__("gzip").compress(write_tar(tmp_path / "x", samples).read_bytes()))
    keys = [batch.keys for batch in batches(str(plain), 20)]
    assert keys == [batch.keys for batch in batches(str(zipped), 20)]
    assert keys[5:] == [batch.keys for batch in batches(str(plain), 15, start=5)]


def test_the_place_in_a_tar_of_img2dataset(tmp_path: Path) -> None:
    """Its writer, webdataset's, puts an extended header before each file."""
    with TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, fields in map(sample, range(9)):
            writer.write({"__key__": key, **fields, "json": {"n": key}})
    with (tmp_path / "0.tar").open("rb") as file:
        byte, number = start_of(file, 7, Heart())
        assert (number, byte > 0) == (7, True)
        file.seek(byte)
        assert [f["__key__"] for f in samples_of(Stream(file, Heart(), 1))] == ["000007", "000008"]


@pytest.mark.parametrize("damage", ["twice", "checksum", "meta"])
def test_reading_from_a_place_is_reading_from_the_front(tmp_path: Path, damage: str) -> None:
    """Where reading from the front stops, so does reading from a place behind."""
    samples = [sample(number) for number in range(8)]
    path = write_tar(tmp_path / "0.tar", samples)
    if damage == "twice":
        with tarfile.open(path, "a") as tar:
            for name in ("000007.txt", "000009.jpg", "000010.jpg"):
                info = tarfile.TarInfo(name)
                info.size = 5
                tar.addfile(info, io.BytesIO(b"again"))
    elif damage == "checksum":
        data = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            data[tar.getmember("000003.jpg").offset + 150] ^= 1
        path.write_bytes(data)
    else:
        write_tar(path, [("__meta__/x", {"json": b"{}"}), *samples])
    whole = {}
    with contextlib.suppress(OSError), open_shard(str(path)) as stream:
        whole = {n: fields["__key__"] for n, fields in enumerate(samples_of(stream))}
    for number in range(11):
        with path.open("rb") as file:
            byte, first = start_of(file, number, Heart())
            file.seek(byte)
            found = {}
            with contextlib.suppress(OSError):
                found = {n: f["__key__"] for n, f in enumerate(samples_of(Stream(file, Heart(), 1)), first)}
        if number in whole:
            assert found[number] == whole[number]
        else:
            assert number not in found


def test_text_of_all_kinds(tmp_path: Path) -> None:
    """Names in Latin-1 are replaced by what can be said; half an emoji, text in Latin-1 and json without end by another
    sample."""
    deep = b'{"captions": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    samples = [
        ("half", {"jpg": jpeg(1), "json": b'{"captions": ["dog \\ud83d", "cat"]}'}),
        ("M\udce4dchen", {"jpg": jpeg(2), "txt": "M\u00e4dchen".encode()}),
        ("latin", {"jpg": jpeg(5), "txt": "M\u00e4dchen".encode("latin-1")}),
        ("deep", {"jpg": jpeg(3), "json": deep, "txt": b"words"}),
        ("deeper", {"jpg": jpeg(4), "json": deep}),
    ]
    pattern = str(write_tar(tmp_path / "0.tar", samples))
    served = batches(pattern, 8, batch=4, streams=1, workers=1)
    assert {(fault.key, fault.reason) for batch in served for fault in batch.faults} == {
        ("deeper", "no caption in its .txt or .json"),
        ("half", "text is not valid Unicode"),
        ("latin", "text is not UTF-8"),
    }
    keys = {key for batch in served for key in batch.keys}
    assert keys == {"M\ufffddchen", "deep"}
    assert all(key.encode() for key in keys)


def test_more_workers_than_samples_of_a_rank(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, [3])
    (only,) = batches(pattern, 1, rank=1, world=12, workers=4)
    assert len(only) == 1


def test_sets_by_weight(tmp_path: Path) -> None:
    """Three of four samples from the smaller set, each set with epochs of its own, at any number of ranks."""
    large = str(write_tar(tmp_path / "a.tar", map(sample, range(60))))
    small = str(write_tar(tmp_path / "b.tar", map(sample, range(100, 110))))
    options = {"weights": [1, 3]}
    expected = global_keys([large, small], 40, 1, **options)
    assert global_keys([large, small], 40, 2, workers=2, **options) == expected
    assert all(2 <= sum(key < "0001" for key in keys) <= 4 for keys in expected)
    served = Counter(key for keys in expected for key in keys)
    assert sum(count for key, count in served.items() if key < "0001") == 120
    assert {count for key, count in served.items() if key < "0001"} == {2}
    assert max(served.values()) - min(count for key, count in served.items() if key >= "0001") <= 2 + 36
    assert {count for key, count in served.items() if key >= "0001"} <= {35, 36, 37}


def test_duplicates_share_an_id(tmp_path: Path) -> None:
    fields = [
        {"jpg": jpeg(1), "txt": b"A dog."},
        {"jpg": jpeg(1), "txt": b"another"},
        {"jpg": jpeg(2), "txt": b"a  DOG"},
        {"jpg": jpeg(3), "txt": b"a cat"},
    ]
    pattern = str(write_tar(tmp_path / "0.tar", [(str(n), one) for n, one in enumerate(fields)]))
    (batch,) = batches(pattern, 1, batch=4, streams=1)
    ids = batch.pair_ids[[batch.keys.index(str(n)) for n in range(4)]]
    same = (ids[:, None] == ids[None]).any(-1)
    assert same.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 2], [3, 3]]
    assert duplicates(ids) == 2
    assert duplicates(torch.cat([ids, ids[:1]])) == 2 + 3  # the first once more: with itself, and with its two
    assert duplicates(ids[:, :1]) == 1


BAD = {
    "no picture": (5, {"jpg": b"no picture", "txt": b"words"}, "the image cannot be decoded: not an image"),
    "cut": (9, {"jpg": jpeg(9, (64, 64))[:-30], "txt": b"words"}, "the image cannot be decoded: "),
    "no caption": (17, {"jpg": jpeg(17)}, "no .txt or .json beside its picture in the tar"),
    "empty caption": (30, {"jpg": jpeg(30), "txt": b"   "}, "no caption in its .txt or .json"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """47 samples in 3 shards, four of them bad."""
    folder = tmp_path_factory.mktemp("damaged")
    samples = [sample(number) for number in range(47)]
    for number, fields, _ in BAD.values():
        samples[number] = (samples[number][0], fields)
    for number, (start, stop) in enumerate(((0, 12), (12, 13), (13, 47))):
        write_tar(folder / f"{number}.tar", samples[start:stop])
    return str(folder / "{0..2}.tar")


def test_bad_samples_are_replaced_and_named(damaged: str, uneven: str) -> None:
    served = batches(damaged, 47, batch=4)
    faults = Counter(fault for batch in served for fault in batch.faults)
    assert {fault.key: times for fault, times in faults.items()} == {
        f"{number:06d}": 4 for number, _, _ in BAD.values()
    }
    for number, _, reason in BAD.values():
        (fault,) = [fault for fault in faults if fault.key == f"{number:06d}"]
        assert reason in fault.reason
        assert fault.shard.endswith(f"{0 if number < 12 else 2}.tar")
    keys = Counter(key for batch in served for key in batch.keys)
    # the good ones stand where they stood, four times each; others stand in sixteen times
    assert all(keys[sample(number)[0]] >= 4 for number in range(47) if number not in (5, 9, 17, 30))
    assert sum(keys.values()) == 47 * 4
    assert not {"000005", "000009", "000017", "000030"} & set(keys)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 3)])
def test_what_stands_in_is_the_same_everywhere(damaged: str, world: int, workers: int) -> None:
    assert global_keys(damaged, 24, world, workers=workers) == [batch.keys for batch in batches(damaged, 24)]


def test_nothing_usable_ends_at_once(tmp_path: Path) -> None:
    pattern = str(write_tar(tmp_path / "0.tar", [(str(n), {"jpg": jpeg(n), "txt": b""}) for n in range(30)]))
    with pytest.raises(
        UserError, match=r"0\.tar, sample \d+: no caption .* none of 200 samples .* can be used"
    ) as error:
        batches(pattern, 1, workers=1)
    assert "\n" not in str(error.value)


def test_caption_filters(tmp_path: Path) -> None:
    said = [b"a", b"two words", b"here are three", b"see www.example.com now", b"one two three four five"]
    pattern = str(
        write_tar(tmp_path / "0.tar", [(f"{n}", {"jpg": jpeg(n), "txt": text}) for n, text in enumerate(said)])
    )
    only = {"min_words": 2, "max_words": 4, "exclude": r"www\."}
    served = batches(pattern, 20, batch=5, streams=1, captions=only)
    assert {key for batch in served for key in batch.keys} == {"1", "2"}
    faults = Counter((fault.kind, fault.key) for batch in served for fault in batch.faults)
    assert faults == {("filtered", "0"): 20, ("filtered", "3"): 20, ("filtered", "4"): 20}


def test_filters_leave_the_other_captions_of_a_sample(tmp_path: Path) -> None:
    meta = b'{"captions": ["short", "a longer caption", "another long caption"]}'
    pattern = str(write_tar(tmp_path / "0.tar", [(f"{n}", {"jpg": jpeg(n), "json": meta}) for n in range(40)]))
    served = batches(pattern, 4, batch=10, captions={"min_words": 3})
    assert not [fault for batch in served for fault in batch.faults]
    captions = Counter(int(caption) for batch in served for caption in batch.pair_ids[:, 1])
    assert len(captions) == 2
    assert min(captions.values()) > 5


def test_a_worker_that_is_killed_while_the_loader_closes(uneven: str) -> None:
    """What torch raises on its SIGCHLD takes the place of no error that is under way."""
    made = loader(uneven, workers=2)
    next(iter(made))
    begun = made._loader._iterator
    shut_down = begun._shutdown_workers
    killed = begun._workers[0]

    def killing() -> None:
        killed.kill()
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
        shut_down()

    begun._shutdown_workers = killing
    made.close()
    begun._shutdown_workers = shut_down
    for worker in begun._workers:
        worker.join(10)
        assert not worker.is_alive()
