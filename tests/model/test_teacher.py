"""Teachers from elsewhere: a CLIPModel of transformers gives what transformers itself computes."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sources
import torch
from clips import clip_folder
from PIL import Image
from starting import losses, start
from tars import write_tar
from transformers import CLIPModel, CLIPProcessor

from sacl_ds.data.batch import TrainingView
from sacl_ds.data.collate import Collator
from sacl_ds.data.order import Place
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import Sample
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.model.teacher import load_teacher, teacher_features

CAPTIONS = ["a red circle left the blue cross", "cross", "the red circle above a red red red red red circle"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


def samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    shapes = [(50, 70, 3), (32, 32, 3), (91, 40, 3)]
    images = [torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8)).permute(2, 0, 1) for shape in shapes]
    return [Sample(str(i), Picture(image), [CAPTIONS[i]], [0], bytes([i])) for i, image in enumerate(images)]


def test_similarities_equal_those_of_transformers(clip: Path) -> None:
    teacher = load_teacher(str(clip), torch.device("cpu"))
    own = TrainingView(CanonicalView(16), Tokenizer(train_wordpiece(CAPTIONS * 3, 60), 12))
    collator = Collator(own, 0, None, teacher.view)
    batch = collator([collator.item(sample, Place(0, 0, 0)) for sample in samples()])
    image, text = teacher_features(teacher, batch)
    halves = teacher_features(teacher, batch, "bf16")
    assert all(half.dtype == torch.float32 for half in halves)
    away = (halves[0] @ halves[1].T - image @ text.T).abs().max()
    assert 1e-6 < away < 0.02  # bf16 keeps 8 bits: 1/256 of a product, less of a sum

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    images = [Image.fromarray(sample.picture.pixels().permute(1, 2, 0).numpy()) for sample in samples()]
    inputs = processor(text=CAPTIONS, images=images, return_tensors="pt", padding=True, truncation=True, max_length=24)
    with torch.no_grad():
        theirs = model(**inputs)
    expected = theirs.logits_per_image / model.logit_scale.exp()
    assert torch.allclose(image @ text.T, expected, rtol=0, atol=1e-6)
    assert (image @ text.T).std() > 1e-3
    assert image.shape == text.shape == (3, 16)


def test_a_run_with_a_clip_teacher(clip: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", f"teacher.checkpoint={clip}", "train.steps=3", ranks=2)
    assert losses(tmp_path / "run", "alpha")[0] == 1.0
    assert all(abs(loss) < 50 for loss in losses(tmp_path / "run"))


def test_a_model_of_another_kind_is_refused(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"teacher\.checkpoint=.*holds a model of type .bert."):
        load_teacher(str(tmp_path), torch.device("cpu"))
    with pytest.raises(UserError, match="without network"):
        load_teacher("nobody/no-such-clip", torch.device("cpu"))


def precompute(teacher: Path, shards: str, *more: str) -> subprocess.CompletedProcess[str]:
    return sources.run("precompute_teacher", "--teacher", teacher, "--shards", shards, "--batch-size", "7", *more)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards with several captions a sample, large pictures among them, and one that is damaged."""
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(1)
    samples = []
    for number in range(40):
        size = (300, 400) if number % 9 == 0 else (40, 60)
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "jpeg")
        said = json.dumps({"captions": CAPTIONS[: 1 + number % 3]}).encode()
        samples.append((f"{number:04d}", {"jpg": buffer.getvalue(), "json": said}))
    samples[33][1]["jpg"] = samples[33][1]["jpg"][:-100]
    for number in range(2):
        write_tar(folder / f"{number}.tar", samples[25 * number : 25 * number + 25])
    return str(folder / "{0..1}.tar")


def test_precomputed_features_train_like_the_teacher(clip: Path, shards: str, tmp_path: Path) -> None:
    """The same losses as with the teacher at work, to what half precision leaves."""
    said = precompute(clip, shards)
    assert said.returncode == 0, said.stderr
    assert "1.tar: 1 samples cannot be used" in said.stdout
    arguments = [
        "data.source=shards", f"data.shards={shards}", f"teacher.checkpoint={clip}", "train.steps=8",
        "loss.matching_weight=0", "loss.mlm_weight=0",
    ]  # fmt: skip
    start(tmp_path / "live", *arguments)
    start(tmp_path / "stored", *arguments, "teacher.features=beside", "data.workers=1", ranks=2)
    live, stored = (losses(tmp_path / name, "itc") for name in ("live", "stored"))
    assert len(live) == 8
    assert stored == pytest.approx(live, rel=1e-3)
    start(tmp_path / "without", *arguments, "loss.sharpness=0")
    assert losses(tmp_path / "without", "itc") != pytest.approx(live, rel=1e-2)


@pytest.mark.parametrize(("part", "what"), [("visual_projection", "images"), ("text_projection", "captions")])
def test_features_that_overflow_are_not_kept(part: str, what: str, clip: Path, shards: str, tmp_path: Path) -> None:
    """Of a teacher whose weights are finite and overflow."""
    model = CLIPModel.from_pretrained(clip)
    getattr(model, part).weight.data.fill_(3e38)
    shutil.copytree(clip, tmp_path / "clip")
    model.save_pretrained(tmp_path / "clip")
    done = precompute(tmp_path / "clip", shards, "--out", tmp_path / "features")
    assert done.returncode == 2
    line = f"the teacher's features of its {what} are not finite; give another teacher"
    assert re.fullmatch(rf"error: .*/0\.tar: {line}\n", done.stderr), done.stderr
    assert not (tmp_path / "features").exists()


def test_features_are_kept_and_checked(clip: Path, shards: str, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    assert precompute(clip, shards, "--out", folder, "--part", "1/2").returncode == 0
    (first,) = folder.iterdir()
    before = first.stat().st_mtime_ns
    run = ["data.source=shards", f"data.shards={shards}", f"teacher.checkpoint={clip}", f"teacher.features={folder}"]

    def said(*arguments: str) -> str:
        done = start(tmp_path / "run", *run, *arguments, check=False)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2
        return line

    assert "1.tar: there are none; run tools/precompute_teacher.py" in said()
    assert "1 shards done, 1 were there" in precompute(clip, shards, "--out", folder).stdout
    assert first.stat().st_mtime_ns == before
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        model.logit_scale += 1e-3
    other = tmp_path / "other"
    shutil.copytree(clip, other)
    model.save_pretrained(other)
    assert "those there are of another teacher (0.teacher-" in said(f"teacher.checkpoint={other}")
    name = first.name.replace("0.", "1.")
    (folder / name).write_bytes(first.read_bytes())
    assert "is of another version of its shard" in said()
    (folder / name).write_bytes(b"")
    assert "1.teacher-" in said()
    assert "give teacher.checkpoint" in said("teacher.checkpoint=null")
    copied = tmp_path / "copied"
    shutil.copytree(clip, copied)
    assert len({load_teacher(str(folder), torch.device("cpu")).identity for folder in (clip, copied, other)}) == 2
