"""Tars as people and tools write them: every sample is read, or counted and named; from any place as from the front."""

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tars import batches, jpeg
from webdataset import TarWriter

from sacl_ds.data.inspection import inspect_shards
from sacl_ds.data.order import Block, Place
from sacl_ds.data.sample import BadSample, SampleFault
from sacl_ds.data.shards.index import ShardIndex, count_samples
from sacl_ds.data.shards.source import ShardSource

SAMPLES = 6
IMAGES = [jpeg(40 * i) for i in range(SAMPLES)]
Entry = tuple[str, bytes | str | None]  # name; content, the name that a link leads to, None for a folder


def files(key: Callable[[int], str] = "{:03d}".format) -> list[Entry]:
    return [
        entry for i in range(SAMPLES) for entry in [(f"{key(i)}.jpg", IMAGES[i]), (f"{key(i)}.txt", f"{i}".encode())]
    ]


def repeated(draw: Any) -> list[Entry]:
    """Some names twice: beside each other, and at the end, as `tar --append` has them."""
    made = files()
    beside = draw(st.sets(st.sampled_from(range(len(made))), max_size=3))
    later = draw(st.lists(st.sampled_from(made), max_size=3))
    return [entry for i, entry in enumerate(made) for _ in range(1 + (i in beside))] + later


def linked(draw: Any) -> list[Entry]:
    """Some pictures and captions are links to those of the first sample; folders between."""
    made: list[Entry] = [("deep", None)]
    which = draw(st.sets(st.sampled_from(range(2, 2 * SAMPLES)), max_size=4))
    for i, (name, data) in enumerate(files()):
        made.append((f"deep/{name}", f"deep/000.{name[-3:]}" if i in which else data))
        if draw(st.booleans()):
            made.append((f"deep/folder{i}.jpg", None))
    return made


LAYOUTS: dict[str, Callable[[Any], list[Entry]]] = {
    "ordered": lambda draw: files(),
    "shuffled": lambda draw: draw(st.permutations(files())),
    "dotted": lambda draw: files(draw(st.sampled_from(["x.{}".format, "{}.v1".format, "a.b.{}".format]))),
    "repeated": repeated,
    "linked": linked,
}


def with_python(form: int) -> Callable[[Path, list[Entry], Path], None]:
    def write(path: Path, entries: list[Entry], folder: Path) -> None:
        with tarfile.open(path, "w", format=form) as tar:
            for name, what in entries:
                info = tarfile.TarInfo(name)
                if what is None:
                    info.type = tarfile.DIRTYPE
                elif isinstance(what, str):
                    info.type, info.linkname = tarfile.LNKTYPE, what
                else:
                    info.size, info.mtime = len(what), 1.5  # in pax, with a header of its own
                tar.addfile(info, io.BytesIO(what) if isinstance(what, bytes) else None)

    return write


def with_gnu(path: Path, entries: list[Entry], folder: Path) -> None:
    """Hard links are those of the file system; a name that is there already leads to the file once more."""
    for name, what in entries:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if what is None:
            file.mkdir(exist_ok=True)
        elif isinstance(what, str):
            os.link(folder / what, file)
        else:
            file.unlink(missing_ok=True)
            file.write_bytes(what)
    names = "\n".join(name for name, _ in entries)
    command = ["tar", "--create", "--hard-dereference", "--no-recursion", "-C", folder, "-f", path, "-T", "-"]
    if any(isinstance(what, str) for _, what in entries):
        command.remove("--hard-dereference")
    subprocess.run(command, input=names, text=True, check=True)


def with_webdataset(path: Path, entries: list[Entry], folder: Path) -> None:
    """Which writes files alone: links are left out."""
    with TarWriter(str(path)) as writer:
        for name, what in entries:
            key, _, ending = name.rpartition(".")
            if isinstance(what, bytes):
                writer.write({"__key__": key, ending: what})


WRITERS = {
    "ustar": with_python(tarfile.USTAR_FORMAT),
    "pax": with_python(tarfile.PAX_FORMAT),
    "gnu": with_python(tarfile.GNU_FORMAT),
    "GNU tar": with_gnu,
    "webdataset": with_webdataset,
}


def read(path: Path, count: int, first: int = 0) -> list[tuple[str, list[str], bytes] | SampleFault]:
    """What each place from `first` on holds."""
    source = ShardSource(ShardIndex([str(path)], [[count]]))
    places = [Place(0, 0, offset) for offset in range(first, count)]
    made: list[Any] = []
    for raw in source.read(iter([Block(places, [])])):
        if isinstance(raw, SampleFault):
            made.append(raw)
            continue
        try:
            each = source.decode(raw)
            made.append((each.key, each.captions, each.image_bytes))
        except BadSample as error:
            made.append(error.fault)
    return made


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_sample_is_read_or_named(layout: str, writer: str, data: Any, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("tar")
    entries = LAYOUTS[layout](data.draw)
    WRITERS[writer](folder / "0.tar", entries, folder)
    count = count_samples(str(folder / "0.tar"))
    served = read(folder / "0.tar", count)
    assert len(served) == count
    good = [each for each in served if not isinstance(each, SampleFault)]
    bad = [each for each in served if isinstance(each, SampleFault)]
    # what is read is a picture with its own caption
    assert all(said == [f"{IMAGES.index(image)}"] for _, said, image in good)
    # nobody is forgotten: every picture of the tar is read or named
    with tarfile.open(folder / "0.tar") as tar:
        pictures = {member.name[:-4] for member in tar if member.name.endswith(".jpg") and not member.isdir()}
    assert pictures == {key for key, _, _ in good} | {fault.key for fault in bad}
    assert all(fault.reason and "dict_keys" not in fault.reason for fault in bad)
    if layout == "ordered":
        assert len(good) == SAMPLES
    if layout == "dotted":
        assert len(bad) == SAMPLES
    # random access says the same
    for first in range(count):
        assert read(folder / "0.tar", count, first) == served[first:]
    found = inspect_shards([str(folder / "0.tar")])
    assert not found.unreadable_shards
    assert not found.wrong_stats
    assert sum(found.broken.values()) >= len(bad)
    assert found.sound == (layout == "ordered") or layout in ("shuffled", "repeated", "linked")


def written(folder: Path, entries: list[Entry]) -> Path:
    with_python(tarfile.PAX_FORMAT)(folder / "0.tar", entries, folder)
    return folder / "0.tar"


@pytest.mark.parametrize(
    ("entries", "keys", "reason"),
    [
        ([("1.jpg", b"x"), ("1.jpg", b"x"), ("1.txt", b"a")], ["1"], "two files .jpg of its key in the tar"),
        ([("1.JPG", b"x"), ("1.jpg", b"x")], ["1"], "two files .jpg of its key in the tar"),
        ([("1.jpg", "0.jpg"), ("1.txt", b"a")], ["1"], "its .jpg is a link in the tar; write that with tar --deref"),
        ([("1.jpg", b"x"), ("1.txt", "0.txt")], ["1"], "its .txt is a link in the tar"),
        ([("a.b.jpg", b"x"), ("a.b.txt", b"a"), ("a.c.jpg", b"x")], ["a.b", "a.c"], "a key ends at the first dot"),
        ([("1.gif", b"x"), ("1.txt", b"a")], ["1"], "its picture is .gif; shards hold jpg, jpeg, png, webp"),
        ([("1.jpg", b"x"), ("2.jpg", b"y"), ("1.txt", b"a")], ["1", "2"], "no .txt or .json beside its picture in the"),
        ([("1.txt", b"a"), ("1.cls", b"2")], [], ""),
        ([("._1.jpg", b"x"), ("d/._1.jpg", b"x"), (".x.txt", b"a"), ("__m__/1.jpg", b"x")], [], ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(entries: list[Entry], keys: list[str], reason: str, tmp_path: Path) -> None:
    """Between two samples that are good; the index counts what is read."""
    path = written(tmp_path, [("0.jpg", jpeg(0)), ("0.txt", b"one"), *entries, ("9.jpg", jpeg(9)), ("9.txt", b"two")])
    assert count_samples(str(path)) == 2 + len(keys)
    served = read(path, 2 + len(keys))
    assert served[0] == ("0", ["one"], jpeg(0))
    assert served[-1] == ("9", ["two"], jpeg(9))
    faults = [each for each in served if isinstance(each, SampleFault)]
    assert [fault.key for fault in faults] == keys
    assert all(fault.reason.startswith(reason) for fault in faults)


def test_other_fields_of_a_sample_are_left_to_others(tmp_path: Path) -> None:
    """A mask and a class beside the picture are no samples, wherever they stand."""
    each = [("depth.png", b"x"), ("jpg", jpeg(1)), ("seg.png", b"x"), ("txt", b"a dog"), ("cls", b"3")]
    path = written(tmp_path, [(f"{i}.{ending}", data) for i in range(3) for ending, data in each])
    assert count_samples(str(path)) == 3
    assert read(path, 3) == [(f"{i}", ["a dog"], jpeg(1)) for i in range(3)]
    assert inspect_shards([str(path)]).sound


def test_inspection_tells_files_that_lie_apart(tmp_path: Path) -> None:
    path = written(tmp_path, [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2)), ("2.txt", b"b"), ("1.txt", b"a")])
    found = inspect_shards([str(path)])
    assert dict(found.broken) == {
        "no caption": 1,
        "apart from other files of its key, which belong beside it in the tar (tar --sort=name)": 1,
    }


def test_a_name_twice_costs_its_own_sample_alone(tmp_path: Path) -> None:
    """Through the loader, at the start and from a later step."""
    entries = [entry for i in range(12) for entry in [(f"{i:02d}.jpg", jpeg(i)), (f"{i:02d}.txt", b"words")]]
    path = written(tmp_path, [*entries[:3], entries[2], *entries[3:]])
    served = batches(str(path), 6, batch=4, streams=1)
    assert {fault.key for batch in served for fault in batch.faults} == {"01"}
    assert {key for batch in served for key in batch.keys} == {f"{i:02d}" for i in range(12)} - {"01"}
    assert [batch.keys for batch in batches(str(path), 4, batch=4, streams=1, start=2)] == [b.keys for b in served[2:]]
