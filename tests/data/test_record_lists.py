"""Every kind of source gives exactly the captions and bytes that it holds, and names what is wrong with it."""

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
import sources
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from sources import samples_of

from sacl_ds.data.images import BadImage, examine
from sacl_ds.data.making.lists import coco_records, folder_records, karpathy_records, table_records
from sacl_ds.data.making.record import survey
from sacl_ds.data.making.writer import write_shards
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.errors import UserError


@pytest.mark.parametrize("kind", sources.KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    made = sources.images(tmp_path / "in")
    captions = sources.CAPTIONS
    if kind == "folder":
        captions = [[" ".join(caption.split("\n")) for caption in said] for said in captions]
    arguments = sources.KINDS[kind](tmp_path / "in", [name for name, _ in made], captions)
    done = sources.run("make_shards", *arguments, "--out", tmp_path / "out", "--per-shard", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"3 samples in 2 shards under {tmp_path / 'out'} (0 were there already)\n"
    found = list(samples_of(ShardSource(index_shards(str(tmp_path / "out/{00000..00001}.tar")))))
    assert [sample.key for sample in found] == ["000000000", "000000001", "000000002"]
    assert [sample.captions for sample in found] == captions
    assert [sample.image_bytes for sample in found] == [data for _, data in made]


@pytest.mark.parametrize("form", ["struct", "binary"])
def test_images_inside_parquet(form: str, tmp_path: Path) -> None:
    """As data sets hubs store them; a list of captions, or a row for each."""
    made = [data for _, data in sources.images(tmp_path)]
    if form == "struct":
        column = [{"bytes": data, "path": None} for data in made]
        table = arrow.table({"image": column, "caption": sources.CAPTIONS})
    else:
        pairs = [(data, caption) for data, said in zip(made, sources.CAPTIONS, strict=True) for caption in said]
        table = arrow.table({"image": [data for data, _ in pairs], "caption": [caption for _, caption in pairs]})
    parquet.write_table(table, tmp_path / "t.parquet")
    records = table_records(tmp_path / "t.parquet", tmp_path, "image")
    write_shards(records, tmp_path / "out", 10)
    found = list(samples_of(ShardSource(index_shards(str(tmp_path / "out/00000.tar")))))
    assert [(sample.image_bytes, sample.captions) for sample in found] == list(zip(made, sources.CAPTIONS, strict=True))


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
paths = st.sampled_from(["a.jpg", "b,c.jpg", 'd"e.jpg', "f\ng.jpg", "h\ti.jpg", "ü/女.jpg"])


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(paths, words), min_size=1, max_size=12), ending=st.sampled_from([".csv", ".tsv"]))
def test_any_text_survives_a_table(rows: list[tuple[str, str]], ending: str, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("t") / f"t{ending}"
    sources.write_table(path, {"path": [row[0] for row in rows], "caption": [row[1] for row in rows]})
    expected = [(name, [row[1] for row in group]) for name, group in itertools.groupby(rows, key=lambda row: row[0])]
    records = list(table_records(path, Path("root")))
    assert [(record.meta["filename"], list(record.captions)) for record in records] == expected
    assert [record.key for record in records] == [f"{number:09d}" for number in range(len(expected))]
    assert list(table_records(path, Path("root"))) == records


@settings(max_examples=30, deadline=None)
@given(captions=st.lists(words.filter(str.strip), min_size=1, max_size=4))
def test_any_text_survives_a_shard(captions: list[str], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("t")
    arguments = sources.coco(folder, [sources.images(folder)[0][0]], [captions])
    write_shards(coco_records(Path(arguments[2]), folder), folder / "out", 1)
    (sample,) = samples_of(ShardSource(index_shards(str(folder / "out/00000.tar"))))
    assert sample.captions == [caption.strip() for caption in captions]


def test_unquoted_tables(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('caption\tpath\n"open quote\ta.jpg\nsays "x" and\tb.jpg\n')
    records = list(table_records(tmp_path / "t.tsv", tmp_path, quotes=False))
    assert [record.captions for record in records] == [['"open quote'], ['says "x" and']]
    with pytest.raises(UserError, match=r"t\.tsv line \d: .*--no-quotes"):
        list(table_records(tmp_path / "t.tsv", tmp_path))


@pytest.mark.parametrize(
    ("text", "delimiter", "columns"),
    [
        ("filepath\ttitle\nx.jpg\ta dog, running\n", "\\t", ("filepath", "title")),
        ("image_name| comment_number| comment\nx.jpg| 0| a dog, running\n", "|", ("image_name", "comment")),
        ("path;caption\nx.jpg;a dog, running\n", ";", ("path", "caption")),
        ("path, caption\nx.jpg, a dog\n", ", ", ("path", "caption")),
    ],
)
def test_tables_with_other_delimiters(text: str, delimiter: str, columns: tuple[str, str], tmp_path: Path) -> None:
    """open_clip's .csv, Kaggle's Flickr30k, spreadsheets."""
    (tmp_path / "t.csv").write_text(text)
    (record,) = table_records(tmp_path / "t.csv", tmp_path, *columns, delimiter=delimiter)
    assert record.meta["filename"] == "x.jpg"
    assert record.captions == ["a dog, running" if delimiter != ", " else "a dog"]


def test_folders_are_sorted(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.png", "a.png", "c.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(sources.image(0, "png"))
        (tmp_path / name).with_suffix(".txt").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "b/loop").symlink_to(tmp_path)
    found = [record.meta["filename"] for record in folder_records(tmp_path)]
    assert found == ["a.png", "b/10.png", "b/2.png", "b.png", "c.png"]


def test_linked_folders(tmp_path: Path) -> None:
    """Each is read once: from elsewhere, under two names, and where links lead back or nowhere."""
    for name in ("in/a/0", "in/a/1", "in/d/4", "other/2", "other/deep/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(sources.image(0, "png"))
        (tmp_path / f"{name}.txt").write_text("x")
    for link, target in {"b": "../other", "c": "a", "a/up": "..", "b/deep/again": "../../in", "self": "self"}.items():
        (tmp_path / "in" / link).symlink_to(target)
    found = [record.meta["filename"] for record in folder_records(tmp_path / "in")]
    assert found == ["a/0.png", "a/1.png", "b/2.png", "b/deep/3.png", "d/4.png"]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["jpeg", "progressive", "png", "webp"]))
def test_examined_images_are_those_that_decode(data: st.DataObject, kind: str) -> None:
    """Also cut at any place, or with a byte changed: the cheap look agrees with a full decode."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (56, 40, 3), np.uint8))
    picture.save(buffer, "jpeg" if kind == "progressive" else kind, progressive=kind == "progressive")
    whole = buffer.getvalue()
    assert (examine(whole).width, examine(whole).height) == (40, 56)
    spoilt = bytearray(whole[: data.draw(st.integers(0, len(whole)), "cut")])
    if spoilt:
        spoilt[data.draw(st.integers(0, len(spoilt) - 1), "place")] = data.draw(st.integers(0, 255), "byte")
    try:
        Image.open(io.BytesIO(spoilt)).convert("RGB")
        decodes = True
    except Exception:
        decodes = False
    try:
        examine(bytes(spoilt))
        examined = True
    except BadImage as error:
        examined = False
        assert "\n" not in str(error)
    assert decodes == examined


def csv_of(text: str | bytes, name: str = "t.csv", **options: object) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return table_records(folder / name, folder, **options)  # type: ignore[arg-type]

    return make


def parquet_of(columns: dict[str, list[object]], *names: str) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        parquet.write_table(arrow.table(columns), folder / "t.parquet")
        return table_records(folder / "t.parquet", folder, *names)

    return make


def json_of(read: Callable[..., object], document: object, *more: str) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        (folder / "t.json").write_text(document if isinstance(document, str) else json.dumps(document))
        return read(folder / "t.json", folder, *more)

    return make


def files_of(**texts: str | bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        for name, text in texts.items():
            (folder / name.replace("__", ".")).write_bytes(text.encode() if isinstance(text, str) else text)
        (folder / "x.jpg").unlink()
        return folder_records(folder)

    return make


COCO = {"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
ERRORS = {
    "another ending": (csv_of("", "t.xlsx"), r"t\.xlsx: a table's name ends in \.csv"),
    "no such table": (lambda folder: table_records(folder / "no.csv", folder), r"cannot read .*no\.csv: No such file"),
    "empty table": (csv_of(""), r"t\.csv has no column 'path'; give --image-column; its columns: none"),
    "only a header": (csv_of("path,caption\n"), "there are no samples"),
    "misspelt column": (
        csv_of("path,captions,url\n"),
        r"no column 'caption'; did you mean 'captions'\? give --caption-column; its columns: path, captions, url",
    ),
    "misspelt in parquet": (
        parquet_of({"path": ["x.jpg"], "text": ["a"]}, "paht", "text"),
        r"no column 'paht'; did you mean 'path'\? give --image-column; its columns: path, text",
    ),
    "no text in column": (parquet_of({"path": ["x.jpg"], "caption": [3]}), "'caption' holds int64, no text"),
    "no image in column": (parquet_of({"path": [1.5], "caption": ["a"]}), "'path' holds double, neither paths nor"),
    "no parquet": (csv_of("path,caption\n", "t.parquet"), r"cannot read .*t\.parquet: "),
    "no gzip": (csv_of("path,caption\nx.jpg,a\n", "t.csv.gz"), r"cannot read .*t\.csv\.gz: Not a gzipped file"),
    "cut gzip": (csv_of(b"\x1f\x8b\x08\x00", "t.csv.gz"), r"cannot read .*t\.csv\.gz"),
    "not UTF-8": (csv_of(b"path,caption\nx.jpg,caf\xe9\n"), r"t\.csv: not UTF-8 text"),
    "open quote": (csv_of('path,caption\nx.jpg,"a\n'), r"t\.csv line \d: unexpected end of data; .*--no-quotes"),
    "short row": (csv_of("path,caption\nx.jpg,a\nx.jpg\n"), r"first .*t\.csv line 3: 1 values under 2 columns"),
    "no caption": (csv_of("path,caption\nx.jpg,a\nx.jpg,b\nx.jpg,\n"), r"t\.csv line 4: empty caption: number 3 of 3"),
    "only blanks": (csv_of("path,caption\nx.jpg,  \n"), r"1 of 1 .* line 2: no caption"),
    "null caption": (parquet_of({"path": ["x.jpg"] * 2, "caption": ["a", None]}), r"t\.parquet row 2: empty caption"),
    "no path": (csv_of("path,caption\n,a\n"), r"line 2: no image"),
    "missing image": (
        csv_of("path,caption\nx.jpg,a\ny.jpg,b\nz.jpg,c\n"),
        r"2 of 3 samples cannot be written \(2 image missing\), first .*t\.csv line 3: image missing: .*y\.jpg; "
        r"correct them or leave such samples out with --skip-broken",
    ),
    "captions for paths": (csv_of(f"path,caption\n{'x' * 5000},a\n"), "image unreadable: .*File name too long"),
    "folder for an image": (csv_of("path,caption\n.,a\n"), r"image is no file"),
    "no JSON": (json_of(coco_records, "{"), r"t\.json line 1: not valid JSON"),
    "no COCO": (
        json_of(coco_records, {"images": []}),
        r"t\.json is no COCO captions JSON: no list 'annotations' in it",
    ),
    "results of COCO": (
        json_of(coco_records, [{"image_id": 1, "caption": "a"}]),
        r"list, not an object .* captions_",
    ),
    "COCO with null": (
        json_of(coco_records, {**COCO, "annotations": [{"image_id": 1, "caption": None}]}),
        r"image 1 \(x\.jpg\): no caption",
    ),
    "COCO with a list": (
        json_of(coco_records, {**COCO, "annotations": [*COCO["annotations"], {"image_id": 1, "caption": ["a", "b"]}]}),
        r"t\.json annotations\[1\]: not as expected: caption is \['a', 'b'\], not text",
    ),
    "COCO without id": (
        json_of(coco_records, {**COCO, "images": [{"file_name": "x.jpg"}]}),
        r"t\.json images\[0\]: 'id' is missing",
    ),
    "a comma for tabs": (csv_of("path\tcaption\nx.jpg\ta\n"), r"give --delimiter '\\t'"),
    "a comma for semicolons": (
        csv_of("path;caption\nx.jpg;a\n"),
        r"header is one column, .* --delimiter ';'",
    ),
    "two delimiters": (
        lambda folder: table_records(folder / "x.csv", folder, delimiter=";;"),
        r"--delimiter ';;': give one character",
    ),
    "empty COCO": (json_of(coco_records, {"images": [], "annotations": []}), r"'images' is empty"),
    "orphan caption": (
        json_of(coco_records, {**COCO, "annotations": [*COCO["annotations"], {"image_id": 5, "caption": "b"}]}),
        "image_id 5: caption of an image that 'images' lacks",
    ),
    "COCO without caption": (json_of(coco_records, {**COCO, "annotations": []}), r"image 1 \(x\.jpg\): no caption"),
    "half a surrogate": (
        json_of(coco_records, {**COCO, "annotations": [{"image_id": 1, "caption": "\ud83d"}]}),
        "text is not valid Unicode",
    ),
    "no Karpathy": (json_of(karpathy_records, {"images": [{"split": "x"}]}, "x"), "is no Karpathy JSON"),
    "no folder": (lambda folder: folder_records(folder / "no"), "no is no folder; correct --images"),
    "text alone": (files_of(y__txt="a"), r"y\.txt: no jpg, jpeg, png, webp beside the text"),
    "image alone": (files_of(y__png=b"0"), r"y\.png: no \.txt beside the image"),
    "empty text": (files_of(y__png=b"0", y__txt="\n"), r"y\.png: no caption"),
    "latin text": (files_of(y__png=b"0", y__txt=b"\xe9"), r"y\.png: text is not UTF-8"),
    "empty image": (files_of(y__png=b"", y__txt="a"), r"y\.png: image file is empty"),
}


@pytest.mark.parametrize(("make", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_before_anything_is_written(make, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(sources.image(0))
    with pytest.raises(UserError, match=message) as error:
        survey(make(tmp_path), skip_broken=False).require(skip_broken=False)
    assert "\n" not in str(error.value)
