"""What tools/make_shards.py says of lists that are not what it reads."""

import json
from pathlib import Path

import pytest
from documented import assert_documented, said
from starting import program

IMAGES = {"images": [{"id": 1, "file_name": "1.jpg"}]}


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("t.csv", "filepath\ttitle\n1.jpg\ta dog\n", ["--image-column", "filepath", "--caption-column", "title"]),
        ("t.csv", "path;caption\n1.jpg;a dog\n", ["--delimiter", ";;"]),
        ("t.json", [{"image_id": 1, "caption": "a dog"}], []),
        ("t.json", {**IMAGES, "annotations": [{"image_id": 1, "caption": ["a", "b"]}]}, []),
        ("t.json", {**IMAGES, "annotations": [{"image_id": 1, "caption": None}]}, []),
    ],
    ids=["tabs", "delimiter", "results", "list", "null"],
)
def test_lines(name: str, text: object, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"x")
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
    of = ["table", "--table"] if name.endswith("csv") else ["coco", "--json"]
    out = ["--images", tmp_path, "--out", tmp_path / "out"]
    done = program("tools/make_shards.py", *of, tmp_path / name, *options, *out, check=False)
    assert_documented(said(done, tmp_path))
