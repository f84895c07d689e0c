"""Real tars, written and read back."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from sources import samples_of
from starting import program

from sacl_ds.data.making.lists import karpathy_records, scene_records
from sacl_ds.data.making.record import survey
from sacl_ds.data.making.writer import Record, write_shards
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.errors import UserError


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (value % 256, 0, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


def records(count: int) -> list[Record]:
    return [
        Record(f"{i:06d}", [f"picture {i}", f"number {i} again"], lambda i=i: jpeg(i), {"n": i}) for i in range(count)
    ]


def source(pattern: str) -> ShardSource:
    return ShardSource(index_shards(pattern))


def test_written_shards_read_back(tmp_path: Path) -> None:
    assert write_shards(records(25), tmp_path, 10) == (3, 0)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".tar") == ["00000.tar", "00001.tar", "00002.tar"]
    written = source(str(tmp_path / "{00000..00002}.tar"))
    assert written.sets == [[10, 10, 5]]
    found = list(samples_of(written))
    assert [s.key for s in found] == [r.key for r in records(25)]
    assert [s.captions for s in found] == [list(r.captions) for r in records(25)]
    assert [s.image_bytes for s in found] == [r.load() for r in records(25)]
    assert [s.key for s in samples_of(written, 8, 1, 3)] == ["000001", "000004", "000007"]
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert tar.getnames()[:3] == ["000000.jpg", "000000.txt", "000000.json"]


def test_writing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stopping() -> bytes:
        raise Stop

    broken = records(25)
    broken[14] = Record(broken[14].key, broken[14].captions, stopping, broken[14].meta)
    with pytest.raises(Stop):
        write_shards(broken, tmp_path, 10)
    assert [p.name for p in tmp_path.glob("*.tar")] == ["00000.tar"]
    assert write_shards(records(25), tmp_path, 10) == (2, 1)
    assert len(list(samples_of(source(str(tmp_path / "{00000..00002}.tar"))))) == 25
    with pytest.raises(UserError, match="other samples"):
        write_shards(records(25), tmp_path, 12)


def test_karpathy_records(tmp_path: Path) -> None:
    for name in ("x.jpg", "y.jpg"):
        (tmp_path / name).write_bytes(jpeg(1))
    entry = {"sentences": [{"raw": " One . "}, {"raw": "Two"}], "imgid": 5}
    images = [
        {"filename": "x.jpg", "split": "train", **entry},
        {"filename": "y.jpg", "split": "restval", **entry},
        {"filename": "z.jpg", "split": "val", **entry},
    ]
    annotations = tmp_path / "dataset.json"
    annotations.write_text(json.dumps({"images": images}))
    train = karpathy_records(annotations, tmp_path, "train")
    assert [(r.meta["filename"], r.captions) for r in train] == [
        ("x.jpg", [" One . ", "Two"]),
        ("y.jpg", [" One . ", "Two"]),
    ]
    with pytest.raises(UserError, match=r"1 of 1 samples cannot be written .1 image missing.*z\.jpg"):
        survey(karpathy_records(annotations, tmp_path, "val"), skip_broken=False).require(skip_broken=False)
    with pytest.raises(UserError, match="there are: restval, train, val"):
        karpathy_records(annotations, tmp_path, "test")


def test_make_shards_command(tmp_path: Path) -> None:
    program("tools/make_shards.py", "scenes", "--count", "30", "--out", tmp_path, "--per-shard", "20")
    written = source(str(tmp_path / "{00000..00001}.tar"))
    scenes = Scenes(30, 1)
    for sample, index in zip(samples_of(written), range(30), strict=True):
        assert sample.captions == scenes[index].captions
        assert (sample.picture.pixels().permute(1, 2, 0).numpy() == scenes.image(index)).all()
    assert len(scene_records(2, 1, 48, "simple")) == 2
