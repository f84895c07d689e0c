"""Shards, lists, pictures and annotations that a user may have downloaded, made to attack: no command runs, nothing
is read or written elsewhere."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from attacks import Writes, one_line, records_of
from PIL import Image
from sources import samples_of
from tars import jpeg, write_tar, write_tars

from sacl_ds.analysis.report.building import write_report
from sacl_ds.analysis.subject import data_source
from sacl_ds.config_file import load_config
from sacl_ds.data.images import BadImage, examine
from sacl_ds.data.making.lists import coco_records, karpathy_records, table_records
from sacl_ds.data.making.writer import write_shards
from sacl_ds.data.pictures import Picture
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.opening import Heart, ShardCache
from sacl_ds.data.shards.patterns import expand
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.data.shards.tars import read_samples
from sacl_ds.data.teacher_features import FeatureFolder
from sacl_ds.errors import UserError
from sacl_ds.tasks.nlvr2.data import nlvr2_statements
from sacl_ds.tasks.retrieval.task import karpathy_images
from sacl_ds.tasks.vqa.data import vqa_questions

# commands


def test_commands_are_run_only_where_they_are_typed(tmp_path: Path, proof: Path) -> None:
    command = f"pipe:touch {proof}; cat {write_tars(tmp_path, [3])}"
    (tmp_path / "list.txt").write_text(f"# shards\n{command}\n")
    (tmp_path / "run.yaml").write_text(json.dumps({"data": {"source": "shards", "shards": command}}))
    hidden = "{x,p}ipe:touch " + str(proof)
    (tmp_path / "hidden.txt").write_text(hidden)
    run = load_config(tmp_path / "run.yaml", [])
    for pattern in (run.data.shards, f"@{tmp_path}/list.txt", f"@{tmp_path}/hidden.txt", [hidden]):
        with pytest.raises(UserError, match=r"which is done only where you type it; give it on the command line") as e:
            index_shards(pattern or "")
        assert one_line(e)
    assert not proof.exists()
    typed = load_config(tmp_path / "run.yaml", [f"data.shards={command}"])
    assert index_shards(typed.data.shards or "").counts == [3]
    assert proof.exists()


@pytest.mark.parametrize(
    "address",
    ["reference::http://there/refs.json", "simplecache::s3://a/b", "zip://a::b.zip", "git://x", "python://os", "a::b"],
)
def test_lists_name_nothing_but_addresses(address: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(address)
    with pytest.raises(UserError, match="opened by other means than fetching it"):
        expand(f"@{tmp_path}/list.txt")
    (tmp_path / "list.txt").write_text("https://there/0.tar\ns3://bucket/0.tar\n")
    assert expand(f"@{tmp_path}/list.txt") == ["https://there/0.tar", "s3://bucket/0.tar"]


def test_patterns_without_end(tmp_path: Path) -> None:
    for pattern in ("http://there/{0..99999999999}.tar", "http://there/" + "{0..9}" * 9):
        with pytest.raises(UserError, match="stands for more than 300000 shards"):
            expand(pattern)
    with pytest.raises(UserError, match="a zero byte"):
        expand("http://there/\0.tar")


def test_a_run_directory_that_names_commands(tmp_path: Path, proof: Path) -> None:
    """In its configuration and in its records; both are looked at for the report."""
    command = f"pipe:touch {proof}"
    (tmp_path / "run").mkdir()
    data = {"source": "shards", "shards": "x", "eval_shards": command, "cache_dir": str(tmp_path / "elsewhere")}
    (tmp_path / "run/config.yaml").write_text(json.dumps({"data": data}))
    records_of(tmp_path / "run", command, "<script>alert(1)</script>")
    page = write_report(tmp_path / "run", tmp_path / "out").read_text()
    assert not proof.exists()
    assert not (tmp_path / "elsewhere").exists()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    with pytest.raises(UserError, match=r"data\.eval_shards: 'pipe:touch .* runs a command, which is done only"):
        data_source(load_config(tmp_path / "run/config.yaml", []), None)


# shards


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_members_leave_their_tar_as_bytes_alone(tmp_path: Path, proof: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that lead out, links, devices, pickles: nothing is unpacked, none is decoded by its name."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    code = pickle.dumps(Writes(proof))
    members = []
    for key in ("../../0", f"{tmp_path}/1", "a/./../2", "3"):
        for ending, data in (("jpg", jpeg(1)), ("txt", b"words"), ("pyd", code), ("pickle", code), ("npy", code)):
            members.append((tarfile.TarInfo(f"{key}.{ending}"), data))
    for number, kind in enumerate((b"1", b"2", b"3", b"4", b"5", b"6")):
        link = tarfile.TarInfo(f"link{number}.jpg")
        link.type, link.linkname = kind, "/etc/passwd"
        members.append((link, b""))
    path = tar_of(tmp_path / "in/0.tar", *members)
    source = ShardSource(index_shards(str(path)))
    assert source.sets == [[6]]
    found = list(samples_of(source, 4, 0, 1))
    with pytest.raises(UserError, match=r"sample link0: its \.jpg is a link in the tar"):
        list(samples_of(source, 5, 0, 1))
    assert [each.key for each in found] == ["../../0", f"{tmp_path}/1", "a/./../2", "3"]
    assert all(each.captions == ["words"] for each in found)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["0.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert not proof.exists()


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """Of 512 bytes, with any 12 bytes as its size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HOSTILE = {
    "goes back": header("1.txt", b"-0000002000\0"),
    "goes back in base 256": header("1.txt", b"\xff" * 10 + b"\xfc\0"),
    "extended header goes back": header("x", b"-0000002000\0", b"x"),
    "a header of exabytes": header("x", b"\x80\0\0\0\x70" + bytes(7), b"x"),
    "a name of exabytes": header("x", b"\x80\0\0\0\x70" + bytes(7), b"L"),
    "a file of exabytes": header("1.jpg", b"\x80\0\0\0\x70" + bytes(7)),
    "a file of all bytes that there are": header("1.jpg", b"\x80" + b"\xff" * 11),
    "a secret kind of exabytes": header("1.jpg", b"\x80\0\0\0\x70" + bytes(7), b"Z"),
    "left out, of exabytes": header("__1__", b"\x80\0\0\0\x70" + bytes(7)),
    "a file of holes": header("1.jpg", b"00000000000\0", b"S"),
    "headers without end": header("x", b"00000000000\0", b"x") * 2000,
}


def test_headers_that_lie(tmp_path: Path) -> None:
    """Neither an endless loop nor memory for what they claim; samples before them are read."""
    members = (tarfile.TarInfo("0.jpg"), jpeg(0)), (tarfile.TarInfo("0.txt"), b"words")
    good = tar_of(tmp_path / "good", *members).read_bytes()[: 3 * 512 + -(-len(jpeg(0)) // 512) * 512]
    paths = []
    for number, (name, hostile) in enumerate(HOSTILE.items()):
        paths.append(tmp_path / f"{number}.tar")
        paths[-1].write_bytes(good + hostile + bytes(1024))
        with pytest.raises(UserError) as error:
            for each in read_samples(str(paths[-1])):
                assert each["__key__"] == "0", name
        assert one_line(error), name
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from sacl_ds.data.shards.index import index_shards; from sacl_ds.data.shards.source import ShardSource\n"
        "from sacl_ds.errors import UserError\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        source = ShardSource(index_shards(path))\n"
        "        print([source.decode(raw).key for raw in source.whole(0)])\n"
        "    except UserError as error: print('error:', error)\n"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=100, env=env)
    lines = done.stdout.splitlines()
    assert len(lines) == len(HOSTILE), done.stdout + done.stderr
    assert all(line.startswith(("['0']", "error: shard ")) for line in lines), lines


def test_a_small_file_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    """A gzipped tar with an 'image' of 300 MB of zeros among others: that sample alone cannot be used."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for key, size in (("0", 0), ("1", 300 << 20), ("2", 0)):
            data = bytes(size) if size else jpeg(1)
            for name, content in ((f"{key}.jpg", data), (f"{key}.txt", b"words")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert path.stat().st_size < 10e6
    assert [len(each["jpg"]) for each in read_samples(str(path))] == [len(jpeg(1)), 0, len(jpeg(1))]
    assert index_shards(str(path)).counts == [3]


def test_stats_that_no_shard_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pattern = write_tars(tmp_path, [3])
    for says in ("-5", "1e999", "1e18", "9" * 30, '"3"', "null", "[1]", "true", "[" * 5000):
        (tmp_path / "0_stats.json").write_text(f'{{"successes": {says}}}')
        assert index_shards(pattern).counts == [3]
    for kept in (tmp_path / "cache/sacl_ds").iterdir():
        for content in ("[]", f'{{"{tmp_path}/0.tar": 5}}', f'{{"{tmp_path}/0.tar": []}}', "[" * 5000):
            kept.write_text(content)
            assert index_shards(pattern).counts == [3]


def test_a_cache_removes_what_is_its_own(tmp_path: Path) -> None:
    """Wherever data.cache_dir points: the user's files in that folder are not shards that were fetched."""
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "deadbeef-notes").write_text("more of it")
    shards = [write_tar(tmp_path / f"{n}.tar", [(f"{n}", {"jpg": os.urandom(40 << 20)})]) for n in range(3)]
    folder = tmp_path / "home"
    folder.mkdir()
    for path in (tmp_path / "thesis.txt", tmp_path / "deadbeef-notes"):
        path.rename(folder / path.name)
    cache = ShardCache(folder, 100 << 20)
    for path in shards:
        cache.fetch(f"file://{path}", Heart())
    kept = [path.name for path in folder.iterdir() if path.suffix == ".tar"]
    assert len(kept) < 3  # it did have to make room
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert (folder / "deadbeef-notes").exists()


@pytest.mark.parametrize("shard", ["http://h/../../x.tar", "http://h/..", "s3://h/a\\..\\x", "http://h/" + "ü" * 300])
def test_names_of_what_is_derived_from_shards(shard: str, tmp_path: Path) -> None:
    cached = ShardCache(tmp_path, 1)._path(shard)
    features = FeatureFolder(str(tmp_path), "f" * 64).path(shard)
    assert os.path.normpath(cached).startswith(f"{tmp_path}/")
    assert cached.parent == features.parent == tmp_path


# images


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
(PROOF) (w) file closefile
showpage
"""


def test_only_three_formats_are_decoded(tmp_path: Path, proof: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript for an EPS, here a program of that name that leaves a proof."""
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nmkdir -p {proof}; exit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    shapes = Image.new("RGB", (8, 8))
    for kind in ("gif", "bmp", "tiff", "ppm", "tga", "pcx", "ico", "icns", "jpeg2000", "eps"):
        buffer = io.BytesIO()
        shapes.save(buffer, kind)
        for data in (buffer.getvalue(), EPS):
            for look in (examine, lambda data: Picture(data).pixels()):
                with pytest.raises(BadImage, match=r"where shards hold JPEG, PNG or WebP|not an image"):
                    look(data)
    assert not proof.exists()
    with pytest.raises(subprocess.CalledProcessError):
        Image.open(io.BytesIO(EPS)).load()  # the attack is one
    assert proof.exists()


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG that claims to be so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_pictures_of_more_pixels_than_memory_holds() -> None:
    large = bytearray(jpeg(1))
    place = large.index(b"\xff\xc0")
    large[place + 5 : place + 9] = struct.pack(">HH", 65000, 65000)
    for data in (png_of(60_000, 60_000), bytes(large)):
        for look in (examine, lambda data: Picture(data).pixels()):
            with pytest.raises(BadImage, match=r"exceeds limit of \d+ pixels"):
                look(data)


# annotation files


def test_paths_that_lead_out_of_the_images(tmp_path: Path) -> None:
    """A picture beside the folder of images, which its owner did not mean to be read, let alone packed into shards."""
    (tmp_path / "images").mkdir()
    private = tmp_path / "private.jpg"
    private.write_bytes(jpeg(1))
    images, file = tmp_path / "images", tmp_path / "a.json"
    for name in ("../private.jpg", str(private), "a/../../private.jpg"):
        for entry in ({"filename": name}, {"filename": "private.jpg", "filepath": "../"}):
            entry |= {"split": "train", "sentences": [{"raw": "words"}]}
            file.write_text(json.dumps({"images": [entry]}))
            for read in (karpathy_images, karpathy_records):
                with pytest.raises(UserError, match=r"images\[0\]: .*leads out of the folder of images") as error:
                    read(file, images, "train")
                assert one_line(error)
        annotation = {"image_id": 1, "caption": "words"}
        file.write_text(json.dumps({"images": [{"id": 1, "file_name": name}], "annotations": [annotation]}))
        with pytest.raises(UserError, match=r"images\[0\]: .*leads out of the folder of images"):
            coco_records(file, images)
        table = tmp_path / "t.csv"
        table.write_text(f"path,caption\n{name},words\n")
        with pytest.raises(UserError, match=r"line 2: image outside the folder --images"):
            write_shards(table_records(table, images), tmp_path / "out", 10)
        (record,) = table_records(table, tmp_path) if name == str(private) else [None]
        assert record is None or record.load() == private.read_bytes()  # within: an absolute path will do
    line = {"identifier": "dev-1-0-0", "sentence": "words", "label": "True", "directory": "../.."}
    file.write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"line 1: .*leads out of the folder of images"):
        nlvr2_statements(file, images)
    file.write_text(json.dumps({"data_subtype": "../..", "questions": []}))
    with pytest.raises(UserError, match=r"data_subtype '\.\./\.\.' is no name such as val2014"):
        vqa_questions(file, None, images)


def test_shards_are_written_into_their_folder(tmp_path: Path) -> None:
    """Whatever the files are called: members are numbered."""
    (tmp_path / "images").mkdir()
    names = ["..\\..\\a.jpg", "a b;$(x).jpg", "-rf.jpg", "ü\u202e.jpg"]
    for name in names:
        (tmp_path / "images" / name).write_bytes(jpeg(1))
    table = tmp_path / "t.csv"
    table.write_text("path,caption\n" + "".join(f'"{name}",words\n' for name in names), encoding="utf-8")
    write_shards(table_records(table, tmp_path / "images"), tmp_path / "out", 10)
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert all(re.fullmatch(r"\d{9}\.(jpg|txt|json)", name) for name in tar.getnames())
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out", "t.csv"}
