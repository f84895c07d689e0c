"""Small sources of every kind on disk, and the command lines that turn them into shards."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as arrow
from PIL import Image
from pyarrow import parquet
from starting import program

from sacl_ds.data.sample import BadSample, Sample
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.errors import UserError

# awkward ones first: quotes, commas, a line break, other scripts, a tab
CAPTIONS = [['He said "no", twice', "second\nline"], ["Ein Mädchen — 女孩 🙂"], ["tab\tinside", "'single'", "x"]]


def image(number: int, kind: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24 + number % 5, 16), (number % 256, number // 256, 90)).save(buffer, kind)
    return buffer.getvalue()


def images(folder: Path) -> list[tuple[str, bytes]]:
    """Three files: a JPEG, a PNG in a subfolder, a WebP whose name says JPEG."""
    made = [("a b.jpg", image(0)), ("sub/ü.png", image(1, "png")), ("sub/ž.JPG", image(2, "webp"))]
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for name, data in made:
        (folder / name).write_bytes(data)
    return made


def karpathy(folder: Path, names: list[str], captions: list[list[str]]) -> list[str]:
    entries = [
        {"filename": name, "split": "train", "sentences": [{"raw": caption} for caption in said]}
        for name, said in zip(names, captions, strict=True)
    ]
    (folder / "k.json").write_text(json.dumps({"images": entries}))
    return ["karpathy", "--json", str(folder / "k.json"), "--images", str(folder)]


def coco(folder: Path, names: list[str], captions: list[list[str]]) -> list[str]:
    entries = [{"id": 7 * number, "file_name": name} for number, name in enumerate(names)]
    # annotations stand in no particular order
    said = [{"image_id": 7 * n, "caption": c} for n, given in reversed(list(enumerate(captions))) for c in given]
    (folder / "c.json").write_text(json.dumps({"images": entries, "annotations": said}))
    return ["coco", "--json", str(folder / "c.json"), "--images", str(folder)]


def table(ending: str) -> Callable[[Path, list[str], list[list[str]]], list[str]]:
    def make(folder: Path, names: list[str], captions: list[list[str]]) -> list[str]:
        rows = [(caption, name) for name, said in zip(names, captions, strict=True) for caption in said]
        path = folder / f"t{ending}"
        write_table(path, {"text": [row[0] for row in rows], "file": [row[1] for row in rows]})
        columns = ["--image-column", "file", "--caption-column", "text"]
        return ["table", "--table", str(path), "--images", str(folder), *columns]

    return make


def write_table(path: Path, columns: dict[str, list[str]]) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(arrow.table(columns), path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def folder(folder: Path, names: list[str], captions: list[list[str]]) -> list[str]:
    """A text beside each image; a caption there is one line."""
    for name, said in zip(names, captions, strict=True):
        lines = "\n\n".join(" ".join(caption.split("\n")) for caption in said)
        (folder / name).with_suffix(".txt").write_text(f"\n{lines}\n", encoding="utf-8")
    return ["folder", "--images", str(folder)]


KINDS = {
    "karpathy": karpathy,
    "coco": coco,
    "csv": table(".csv"),
    "tsv": table(".tsv"),
    "csv.gz": table(".csv.gz"),
    "tsv.gz": table(".tsv.gz"),
    "parquet": table(".parquet"),
    "folder": folder,
}


def run(tool: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A tool as a user runs it, from this checkout."""
    return program(f"tools/{tool}.py", *arguments, env=environment, check=False)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed tool ends with."""
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.endswith(f"{line}\n")
    return line


def samples_of(source: ShardSource, limit: int | None = None, rank: int = 0, world: int = 1) -> Iterator[Sample]:
    """Decode every world-th of the first `limit` samples in their stored order; UserError for one that cannot be
    used."""
    every = (raw for shard in range(len(source.shards)) for raw in source.whole(shard))
    for raw in islice(every, rank, limit, world):
        try:
            yield source.decode(raw)
        except BadSample as error:
            raise UserError(str(error.fault)) from None
