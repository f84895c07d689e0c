"""Real tars: written, read back, and served without loss at any number of ranks and workers."""

import io
import json
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from sacl_ds.data.batch import Collator, TrainingView
from sacl_ds.data.loader import PairLoader
from sacl_ds.data.order import GlobalOrder
from sacl_ds.data.record_lists import karpathy_records, scene_records
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.shard_writer import Record, write_shards
from sacl_ds.data.shards import ShardSource, expand, stats_path
from sacl_ds.data.survey import survey
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (value % 256, 0, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


def records(count: int) -> list[Record]:
    return [
        Record(f"{i:06d}", [f"picture {i}", f"number {i} again"], lambda i=i: jpeg(i), {"n": i}) for i in range(count)
    ]


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """47 samples in shards of 11, 1 and 35."""
    made = records(47)
    for number, (start, stop) in enumerate(((0, 11), (11, 12), (12, 47))):
        write_shards(made[start:stop], tmp_path / str(number), 100)
        for file in (tmp_path / str(number)).iterdir():
            file.rename(tmp_path / file.name.replace("00000", f"0000{number}"))
    return str(tmp_path / "{00000..00002}.tar")


@pytest.fixture(scope="module")
def collator() -> Collator:
    tokenizer = Tokenizer(train_wordpiece([f"picture number {i} again" for i in range(60)] * 2, 300), 12)
    return Collator(TrainingView(CanonicalView(16), tokenizer), seed=5, mlm_probability=0.3)


def batches(pattern: str, collator: Collator, *, rank: int, world: int, workers: int, start: int, steps: int):
    source = ShardSource(pattern)
    order = GlobalOrder(source.counts, 12, seed=1, streams=4, shuffle_buffer=5)
    loader = PairLoader(source, order, collator, rank=rank, world=world, workers=workers, start_step=start)
    return list(islice(iter(loader), steps))


def test_written_shards_read_back(tmp_path: Path) -> None:
    assert write_shards(records(25), tmp_path, 10) == (3, 0)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".tar") == ["00000.tar", "00001.tar", "00002.tar"]
    source = ShardSource(str(tmp_path / "{00000..00002}.tar"))
    assert source.counts == [10, 10, 5]
    found = list(source.iterate(None, 0, 1))
    assert [s.key for s in found] == [r.key for r in records(25)]
    assert [s.captions for s in found] == [list(r.captions) for r in records(25)]
    assert [s.image_bytes for s in found] == [r.load() for r in records(25)]
    assert [s.key for s in source.iterate(8, 1, 3)] == ["000001", "000004", "000007"]
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
    assert len(list(ShardSource(str(tmp_path / "{00000..00002}.tar")).iterate(None, 0, 1))) == 25
    with pytest.raises(UserError, match="other samples"):
        write_shards(records(25), tmp_path, 12)


def test_counts_without_stats_come_from_the_tar(tmp_path: Path) -> None:
    write_shards(records(7), tmp_path, 10)
    stats_path(tmp_path / "00000.tar").unlink()
    assert ShardSource(str(tmp_path / "00000.tar")).counts == [7]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 0), (2, 2), (3, 2), (4, 3)])
def test_global_batches_do_not_depend_on_ranks_or_workers(
    uneven: str, collator: Collator, world: int, workers: int
) -> None:
    expected = batches(uneven, collator, rank=0, world=1, workers=0, start=0, steps=12)
    parts = [batches(uneven, collator, rank=r, world=world, workers=workers, start=0, steps=12) for r in range(world)]
    for step, whole in enumerate(expected):
        assert [key for part in parts for key in part[step].keys] == whole.keys
        assert torch.equal(torch.cat([part[step].images for part in parts]), whole.images)
        masked = [row[row != 0].tolist() for part in parts for row in part[step].masked_ids]
        assert masked == [row[row != 0].tolist() for row in whole.masked_ids]
    keys = [key for whole in expected for key in whole.keys]
    # 144 slots: three epochs of 47 and three of the fourth
    assert all(2 < keys.count(record.key) < 5 for record in records(47))


def test_resumed_loader_continues(uneven: str, collator: Collator) -> None:
    whole = batches(uneven, collator, rank=0, world=1, workers=0, start=0, steps=12)
    rest = batches(uneven, collator, rank=0, world=1, workers=2, start=5, steps=7)
    assert [b.keys for b in rest] == [b.keys for b in whole[5:]]
    assert all(torch.equal(a.masked_ids, b.masked_ids) for a, b in zip(rest, whole[5:], strict=True))


def test_more_workers_than_samples_of_a_rank(tmp_path: Path, collator: Collator) -> None:
    write_shards(records(3), tmp_path, 10)
    (only,) = batches(str(tmp_path / "00000.tar"), collator, rank=1, world=12, workers=4, start=0, steps=1)
    assert len(only) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda fields: fields | {"jpg": b"no picture"}, "sample a: the image cannot be decoded"),
        (lambda fields: {k: v for k, v in fields.items() if k != "txt"}, "sample a: no caption"),
        (lambda fields: fields | {"txt": b"   "}, "sample a: no caption"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, collator: Collator, spoil, message: str) -> None:
    fields = spoil({"jpg": jpeg(3), "txt": b"a caption"})
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for extension, data in fields.items():
            info = tarfile.TarInfo(f"a.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=message) as error:
        batches(str(tmp_path / "0.tar"), collator, rank=0, world=1, workers=1, start=0, steps=1)
    assert "0.tar" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cut_shard_is_named(tmp_path: Path, collator: Collator) -> None:
    write_shards(records(30), tmp_path, 30)
    shard = tmp_path / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:40_000])
    with pytest.raises(UserError, match=r"00000\.tar"):
        batches(str(shard), collator, rank=0, world=1, workers=0, start=0, steps=3)


@pytest.mark.parametrize(
    ("pattern", "message"), [("", "empty list"), ("/nowhere/{0..3}.tar", r"/nowhere/0\.tar does not exist")]
)
def test_missing_shards(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(pattern)


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


def test_make_shards_command(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, str(root / "tools/make_shards.py"), "scenes", "--count", "30", "--out", str(tmp_path)]
    subprocess.run([*command, "--per-shard", "20"], check=True, capture_output=True)
    source = ShardSource(str(tmp_path / "{00000..00001}.tar"))
    scenes = Scenes(30, 1)
    for sample, index in zip(source.iterate(None, 0, 1), range(30), strict=True):
        assert sample.captions == scenes[index].captions
        assert (torch.tensor(list(sample.image.tobytes())) == torch.from_numpy(scenes.image(index)).flatten()).all()
    assert len(scene_records(2, 1, 48, "simple")) == 2
