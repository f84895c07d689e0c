"""What the inspection says of shards, from small ones whose every figure is known."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sources
from hypothesis import given
from hypothesis import strategies as st
from inspect_shards import COLUMNS, ROWS, sheet_rows
from PIL import Image

from sacl_ds.data.inspection import Example, inspect_shards, quantiles
from sacl_ds.data.making.lists import scene_records
from sacl_ds.data.making.record import Record
from sacl_ds.data.making.writer import write_shards
from sacl_ds.telemetry.sheet import LARGE, TileSize, caption_lines, draw_rows


def picture(width: int, height: int, value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def tar(path: Path, samples: dict[str, dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as file:
        for key, fields in samples.items():
            for extension, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """Two shards: the first without stats; the second whose stats count one sample too many."""
    first = {
        "a": {"png": picture(10, 20, 0), "txt": b"one"},
        "b": {"png": picture(30, 40, 1), "txt": b"two words"},
        "c": {"png": picture(10, 20, 0), "json": json.dumps({"captions": ["one", "and three words"]}).encode()},
        "d": {"png": picture(10, 20, 2), "txt": b"  "},
        "e": {"txt": b"one"},
    }
    second = {
        "f": {"jpg": sources.image(7)[:-10], "txt": b"cut"},
        "g": {"png": picture(10, 20, 0), "txt": "zwei Wörter".encode()},
    }
    files = [tar(tmp_path / "0.tar", first), tar(tmp_path / "1.tar", second)]
    (tmp_path / "1_stats.json").write_text(json.dumps({"successes": 3}))
    return files


def test_every_figure(mixed: list[str]) -> None:
    seen: list[int] = []
    found = inspect_shards(mixed, sheet=4, seen=seen.append)
    assert found.samples == sum(seen) == 7
    assert found.missing_stats == mixed[:1]
    assert found.wrong_stats == [{"shard": mixed[1], "stats": 3, "tar": 2}]
    assert found.broken == {"no caption": 1, "no image": 1, "image does not decode": 1}
    assert [(entry["shard"], entry["key"]) for entry in found.broken_listed] == [
        (mixed[0], "d"),
        (mixed[0], "e"),
        (mixed[1], "f"),
    ]
    assert found.widths == {10: 4, 30: 1}
    assert found.heights == {20: 4, 40: 1}
    sizes = sorted(len(data) for data in (*[picture(10, 20, 0)] * 3, picture(30, 40, 1), picture(10, 20, 2)))
    sizes.append(len(sources.image(7)) - 10)
    assert found.image_sizes() == {
        "min": sizes[0], "p05": sizes[0], "median": sizes[2], "p95": sizes[5], "max": sizes[5]
    }  # fmt: skip
    assert found.words == {1: 4, 2: 2, 3: 1}
    assert found.captions == {0: 1, 1: 5, 2: 1}
    images, captions = found.repeated_images, found.repeated_captions
    assert (images.total, images.repeated) == (6, 2)
    assert images.examples == [
        {"times": 3, "samples": [{"shard": mixed[0], "key": "a"}, {"shard": mixed[0], "key": "c"}]}
    ]
    assert (captions.total, captions.repeated) == (7, 2)
    assert captions.examples[0]["caption"] == "one"
    assert [sample["key"] for sample in captions.examples[0]["samples"]] == ["a", "c"]
    assert found.sheet[-1].key == "g"
    assert {example.key for example in found.sheet[:-1]} < {"a", "b", "c"}
    assert not found.sound


def test_a_cut_shard_counts_up_to_the_cut(tmp_path: Path) -> None:
    whole = {f"{n}": {"png": picture(40, 40, n), "txt": b"x"} for n in range(9)}
    path = Path(tar(tmp_path / "0.tar", whole))
    path.write_bytes(path.read_bytes()[: 5 * 4 * 512 + 512 + 50])  # within the sixth image
    tar(tmp_path / "1.tar", whole)
    found = inspect_shards([str(path), str(tmp_path / "1.tar")])
    assert found.samples - 9 == 4  # as in training, where a sample counts once the next one begins
    (cut,) = found.unreadable_shards
    assert cut["shard"] == str(path)
    assert cut["reason"] == f"shard {path} cannot be read: unexpected end of data"
    assert found.missing_stats == found.shards


def test_limits_and_sheets_spread_over_the_shards(tmp_path: Path) -> None:
    write_shards(scene_records(60, 1, 48, "simple"), tmp_path, 10)
    files = [str(tmp_path / f"{n:05d}.tar") for n in range(6)]
    found = inspect_shards(files, limit=9, sheet=6)
    assert found.samples == 9
    assert Counter(example.shard for example in found.sheet) == Counter(files)
    assert found.sound
    assert not found.complete
    found = inspect_shards(files, sheet=20)
    assert set(Counter(example.shard for example in found.sheet).values()) == {3, 4}
    assert found.sheet == inspect_shards(files, sheet=20).sheet
    assert len({example.key for example in found.sheet}) == 20


@given(st.lists(st.integers(0, 50), min_size=1))
def test_quantiles(values: list[int]) -> None:
    found = quantiles(Counter(values))
    for name, share in (("min", 0), ("p05", 0.05), ("median", 0.5), ("p95", 0.95), ("max", 1)):
        assert found[name] == np.quantile(values, share, method="inverted_cdf"), name
    assert quantiles(Counter()) == {}


@given(st.lists(st.text(min_size=1, max_size=400).filter(str.strip), min_size=1, max_size=7))
def test_captions_fit_their_tile(captions: list[str]) -> None:
    lines = caption_lines(captions, TileSize(300, 225, 8), lambda text: 10.0 * len(text))
    assert 1 <= len(lines) <= 8
    assert all(len(line) <= 30 for line in lines)
    assert lines[0].startswith("–") == (len(captions) > 1)
    shown = "".join(lines).replace("…", "")
    if not lines[-1].endswith((" more", "…")):
        every = [part for caption in captions for part in (["–"] if len(captions) > 1 else []) + caption.split()]
        assert shown.replace(" ", "").replace("\u00a0", "") == "".join(every).replace("\u00a0", "")


def test_a_sheet(tmp_path: Path) -> None:
    """Images of odd shapes and captions of any length; at most a page."""
    shapes = [(1, 500), (500, 1), (48, 48), (128, 96)]
    captions = [["short"], ["long " * 90], ["ohneleerzeichen" * 30], ["a", "b b", "c c c"] * 4]
    examples = [
        Example("0.tar", f"{n}", picture(*shapes[n % 4], n), captions[n // 4 % 4]) for n in range(COLUMNS * ROWS + 3)
    ]
    draw_rows(sheet_rows(examples), tmp_path / "sheet.png", LARGE)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width < 2000
        assert sheet.height < 2000
        whole = sheet.size
    draw_rows(sheet_rows(examples[:3]), tmp_path / "sheet.png", LARGE)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < whole[1] / 2


def test_the_command(mixed: list[str], tmp_path: Path) -> None:
    options = ["--sheet", tmp_path / "sheet.png", "--json", tmp_path / "out.json"]
    done = sources.run("inspect_shards", f"{tmp_path}/{{0..1}}.tar", *options)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    for text in (
        "samples       7",
        "1.tar f: image does not decode",
        "0.tar d: no caption",
        "3 times",
    ):
        assert text in done.stdout
    assert "stats say 3, the tar holds 2" in " ".join(done.stdout.split())
    assert Image.open(tmp_path / "sheet.png").format == "PNG"
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["samples"] == 7
    assert figures["caption_words"]["histogram"] == {"1": 4, "2": 2, "3": 1}
    assert figures["repeated_images"]["share"] == pytest.approx(2 / 6)


def test_the_command_on_sound_shards(tmp_path: Path) -> None:
    records = [
        Record(f"{n}", [f"{'word ' * (n % 40)}{n}"], lambda n=n: sources.image(n), {}, f"row {n}") for n in range(90)
    ]
    write_shards(records, tmp_path, 50)
    done = sources.run("inspect_shards", tmp_path / "00000.tar", tmp_path / "00001.tar")
    assert done.returncode == 0, done.stderr
    for text in ("samples       90", "broken        none", "same image    none occurs twice", "beside every shard"):
        assert text in done.stdout


def test_errors_of_the_command(tmp_path: Path) -> None:
    done = sources.run("inspect_shards", tmp_path / "{0..2}.tar")
    assert "0.tar does not exist (and 2 more of 3)" in sources.error_of(done)
    assert "--limit 0: at least one" in sources.error_of(sources.run("inspect_shards", "x.tar", "--limit", "0"))


@pytest.mark.parametrize(
    "arguments",
    [["make_shards"], ["inspect_shards"]]
    + [["make_shards", source] for source in ("karpathy", "coco", "table", "folder", "scenes")],
)
def test_help(arguments: list[str]) -> None:
    done = sources.run(*arguments, "--help", COLUMNS="80")
    assert done.returncode == 0
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert done.stdout.count("example:") == 1
    if len(arguments) == 2 or arguments == ["inspect_shards"]:
        assert "default" in done.stdout


def test_a_limit_that_all_samples_are_within(tmp_path: Path) -> None:
    """Only where something was left out is that said."""
    each = {"png": picture(4, 4, 9), "txt": b"words"}
    files = [tar(tmp_path / f"{size}.tar", {f"{n}": each for n in range(size)}) for size in (3, 4)]
    complete = {limit: inspect_shards(files, limit).complete for limit in (20_000, 8, 7, 6, 1)}
    assert complete == {20_000: True, 8: True, 7: True, 6: False, 1: False}
    assert not inspect_shards(files, 8).wrong_stats
