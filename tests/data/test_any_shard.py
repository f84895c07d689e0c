"""Whatever bytes a shard is of: samples, faults with their reason, or one line; and nothing is written."""

import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sources import samples_of
from tars import collator, jpeg, loader, sample, write_tar

from sacl_ds.data.captions import BadText, captions_of, normalised
from sacl_ds.data.images import BadImage, examine
from sacl_ds.data.inspection import inspect_shards
from sacl_ds.data.json_files import each_entry, read_json, read_json_lines
from sacl_ds.data.karpathy import karpathy_split
from sacl_ds.data.making.lists import coco_records
from sacl_ds.data.order import Block, Place
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import BadSample, SampleFault
from sacl_ds.data.shards.index import ShardIndex, count_samples
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.errors import UserError, one_line

QUICK = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SOAK = settings(QUICK, max_examples=5000)

names = st.text(max_size=30) | st.sampled_from(
    [
        "../../x.jpg",
        "/etc/x.jpg",
        "x",
        "x.",
        ".jpg",
        "a.b.JPG",
        "x.__key__",
        "x.__bad__",
        "__x__",
        "x.txt",
        "x.json",
        "x/",
        "",
    ]
)
contents = st.binary(max_size=600) | st.sampled_from(
    [jpeg(1), b"words", b'{"captions": ["a", 1]}', b"\xff", b"[" * 9000]
)
members = st.lists(st.tuples(names, contents, st.sampled_from([b"0", b"1", b"2", b"5", b"S", b"x", b"L", b"g", b"7"])))


def read_all(path: Path, count: int) -> None:
    """As training, as the inspection and as the index read it."""
    try:
        assert 0 <= count_samples(str(path)) <= 10_000
    except UserError as error:
        assert_line(error)
    source = ShardSource(ShardIndex([str(path)], [[count]]))
    places = [Place(0, 0, offset) for offset in range(count)]
    reading = source.read(iter([Block(places[count // 2 :], []), Block(places, [])]))
    seen = 0
    for raw in reading:
        seen += 1
        if isinstance(raw, SampleFault):
            assert str(raw) == one_line(str(raw))
            continue
        with suppress(BadSample):
            made = source.decode(raw)
            assert made.captions
            assert made.fingerprint is not None
            with suppress(BadSample):
                collator().item(made, raw.place)
    assert seen == len(places[count // 2 :]) + count
    summary = inspect_shards([str(path)]).summary()
    assert json.dumps(summary)


def assert_line(error: UserError) -> None:
    assert str(error) == one_line(str(error))
    assert 0 < len(str(error)) < 2000


def alone(path: Path) -> bool:
    """Whether it and nothing else is in its folder."""
    return [each.name for each in path.parent.iterdir()] == [path.name]


def whole_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            key, fields = sample(number)
            for ending, data in {**fields, "json": b'{"captions": ["one", "two"]}'}.items():
                info = tarfile.TarInfo(f"{key}é.{ending}")
                info.size, info.mtime = len(data), 1.5  # with an extended header each
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


WHOLE = whole_tar()
mutations = st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=12)
# most bytes of a tar are pixels and zeros: half of the changes go to headers
HEADERS = [place for place in range(0, len(WHOLE), 512) if WHOLE[place + 257 : place + 262] == b"ustar"]
in_headers = st.tuples(st.sampled_from(HEADERS), st.integers(0, 511), st.integers(0, 255))


def mutated(changes: list[tuple[int, int]], headers: list[tuple[int, int, int]], end: int) -> bytes:
    """Bytes changed; the checksums of changed headers are put right, or the first change would be all that is seen."""
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    for header, place, value in headers:
        data[header + place] = value
        block = data[header : header + 512]
        block[148:156] = b" " * 8
        data[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    return bytes(data[:end])


def check_mutated(folder: Path, changes: list, headers: list, end: int) -> None:
    path = folder / "shard.tar"
    path.write_bytes(mutated(changes, headers, end))
    read_all(path, 4)
    assert alone(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one that is also where relative paths lead."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path / "in"


@given(st.binary(max_size=2000))
@QUICK
def test_any_bytes(folder: Path, data: bytes) -> None:
    (folder / "shard.tar").write_bytes(data)
    read_all(folder / "shard.tar", 2)
    assert alone(folder / "shard.tar")


arguments = given(mutations, st.lists(in_headers, max_size=3), st.integers(0, len(WHOLE)) | st.just(len(WHOLE)))


@arguments
@QUICK
def test_mutated_tars(folder: Path, changes: list, headers: list, end: int) -> None:
    check_mutated(folder, changes, headers, end)


@pytest.mark.soak
@arguments
@SOAK
def test_many_mutated_tars(folder: Path, changes: list, headers: list, end: int) -> None:
    check_mutated(folder, changes, headers, end)


@given(members, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
@QUICK
def test_any_members(folder: Path, inside: list[tuple[str, bytes, bytes]], form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogatepass") as tar:
        for name, data, kind in inside:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            with suppress(ValueError, UnicodeError):  # names that no tar can hold
                tar.addfile(info, io.BytesIO(data))
    (folder / "shard.tar").write_bytes(buffer.getvalue())
    read_all(folder / "shard.tar", 3)
    assert alone(folder / "shard.tar")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
described = st.dictionaries(st.sampled_from(["captions", "caption", "key", "sha256", "url"]), json_values, max_size=3)


@given(json_values | described, st.none() | st.binary(max_size=30))
@QUICK
def test_any_json_and_any_caption(meta: Any, text: bytes | None) -> None:
    fields = {"json": json.dumps(meta).encode()} | ({} if text is None else {"txt": text})
    try:
        captions = captions_of(fields)
    except BadText:
        return
    for caption in captions:
        assert caption.strip()
        assert caption.encode()
        assert isinstance(normalised(caption), str)


@given(st.lists(st.text(max_size=200), min_size=2, max_size=6))
@QUICK
def test_captions_of_any_script_reach_the_model(folder: Path, captions: list[str]) -> None:
    """Also control characters, and marks that turn the writing."""
    described = {"jpg": jpeg(1), "json": json.dumps({"captions": [*captions, "a dog"]}).encode()}
    path = write_tar(folder / "shard.tar", [(f"{number}", described) for number in range(4)])
    batch = next(iter(loader(str(path), batch=4)))
    assert batch.input_ids.shape[0] == 4
    assert not batch.faults


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBPVP8 "])
)
@QUICK
def test_any_bytes_as_a_picture(data: bytes, start: bytes) -> None:
    for look in (examine, lambda data: Picture(data).pixels(), lambda data: Picture(data).resized((0, 0, 4, 4), 8)):
        with suppress(BadImage):
            assert look(start + data) is not None


@given(st.sampled_from(["jpeg", "png", "webp"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1))
@QUICK
def test_mutated_pictures(kind: str, changes: list[tuple[float, int]]) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((24, 16), 50).convert("RGB").save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    for look in (examine, lambda data: Picture(data).pixels()):
        with suppress(BadImage):
            assert look(bytes(data)) is not None


entries = st.dictionaries(
    st.sampled_from(["filename", "filepath", "split", "sentences", "sentids", "imgid", "cocoid", "raw", "image_id",
                     "caption", "id", "file_name"]),
    json_values
    | st.lists(st.dictionaries(st.sampled_from(["raw", "sentid"]), json_values), max_size=2)
    | st.just("train"),
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(["images", "annotations"]), st.lists(entries | json_values, max_size=3))
    | json_values
)
@QUICK
def test_any_annotation_file(folder: Path, document: Any) -> None:
    (folder / "a.json").write_text(json.dumps(document))
    for read in (
        lambda path: karpathy_split(path, "train"),
        lambda path: [record.checked_captions(drop_empty=True) for record in coco_records(path, folder)],
    ):
        try:
            assert read(folder / "a.json") is not None
        except UserError as error:
            assert_line(error)
        except Exception as error:  # of a record alone, which the survey counts
            assert type(error).__name__ == "BrokenSample"


@given(
    st.binary(max_size=60) | st.sampled_from([b"[" * 100_000, b"9" * 5000, b"\xef\xbb\xbf{}", b"\xff", b"NaN\n1e999"])
)
@QUICK
def test_any_bytes_as_json(folder: Path, data: bytes) -> None:
    (folder / "a.json").write_bytes(data)
    for read in (read_json, lambda path: list(read_json_lines(path))):
        try:
            read(folder / "a.json")
        except UserError as error:
            assert_line(error)
    with pytest.raises(UserError, match="here 0: not as expected: cannot convert float infinity"):
        each_entry([float("inf")], lambda number: f"here {number}", int)


def test_the_changes_are_seen(folder: Path) -> None:
    """Of the tar that is mutated, four samples are read as it stands; else the trials would show nothing."""
    (folder / "shard.tar").write_bytes(mutated([], [(HEADERS[1], 148, 0)], len(WHOLE)))
    source = ShardSource(ShardIndex([str(folder / "shard.tar")], [[4]]))
    assert [made.captions for made in samples_of(source)] == [["one", "two"]] * 4
    assert len(HEADERS) == 24
