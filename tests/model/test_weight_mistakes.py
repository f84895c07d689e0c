"""Weights, teachers and finished folders that are not what they should be: the lines of docs/lab/mistakes.md."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clips import clip_folder
from documented import assert_documented
from hypothesis import given
from hypothesis import strategies as st
from lines import is_one_line
from safetensors.torch import load_file, save_file
from saved import saved_run
from transformers import BertTokenizerFast, CLIPImageProcessor

from sacl_ds.data.pictures import Picture
from sacl_ds.errors import UserError
from sacl_ds.model.saved import load_model, seal_run
from sacl_ds.model.starts.weights_file import read_weights
from sacl_ds.model.teacher import load_teacher

CPU = torch.device("cpu")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A teacher in a folder called clip, with its image processor in a file of its own."""
    (tmp_path / "clip").mkdir()
    folder = clip_folder(tmp_path / "clip")
    (folder / "processor_config.json").unlink(missing_ok=True)
    processor().save_pretrained(folder)
    return folder


def processor(**changes: object) -> CLIPImageProcessor:
    settings = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    return CLIPImageProcessor(**{**settings, **changes})


def refused(load: Callable[[], object], folder: Path) -> str:
    """The documented line."""
    with pytest.raises(UserError) as error:
        load()
    assert is_one_line(error.value)
    line = f"error: {error.value}".replace(str(folder), "/data")
    assert_documented(line)
    return line


def test_a_teacher_that_lacks_a_part(clip: Path, tmp_path: Path) -> None:
    state = load_file(clip / "model.safetensors")
    short = {name: value for name, value in state.items() if name != "text_projection.weight"}
    save_file(short, clip / "model.safetensors", {"format": "pt"})
    refused(lambda: load_teacher(str(clip), CPU), tmp_path)
    renamed = {f"net.{name}": value for name, value in state.items()}
    save_file(renamed, clip / "model.safetensors", {"format": "pt"})
    refused(lambda: load_teacher(str(clip), CPU), tmp_path)
    save_file(state | {"logit_scale": torch.tensor(float("nan"))}, clip / "model.safetensors", {"format": "pt"})
    refused(lambda: load_teacher(str(clip), CPU), tmp_path)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}, "224 × 224"),
        ({"do_center_crop": False, "size": {"shortest_edge": 32}}, "32 × 48"),
        ({"do_center_crop": False, "do_resize": False}, "40 × 60"),
        ({"do_center_crop": False, "size": {"height": 32, "width": 40}}, "32 × 40"),
        ({"crop_size": {"height": 32, "width": 30}}, "32 × 30"),
    ],
)
def test_pictures_of_another_size(changes: dict, shown: str, clip: Path) -> None:
    processor(**changes).save_pretrained(clip)
    with pytest.raises(UserError, match=rf"image processor makes pictures of {shown}, and the model takes 32 × 32;"):
        load_teacher(str(clip), CPU)


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([{}, {"do_center_crop": False}]))
def test_what_is_accepted_makes_the_models_pictures(height: int, width: int, changes: dict) -> None:
    """Of every picture, whatever its sides."""
    size = {"height": 32, "width": 32} if changes else {"shortest_edge": 36}
    made = processor(size=size, **changes)(torch.zeros(3, height, width, dtype=torch.uint8), return_tensors="pt")
    assert made["pixel_values"].shape == (1, 3, 32, 32)


def test_a_square_without_a_crop_is_accepted(clip: Path) -> None:
    processor(do_center_crop=False, size={"height": 32, "width": 32}).save_pretrained(clip)
    teacher = load_teacher(str(clip), CPU)
    pixels = teacher.view.image(Picture(torch.zeros(3, 40, 60, dtype=torch.uint8)), ())
    assert torch.isfinite(teacher.image_features(pixels[None])).all()


@pytest.mark.parametrize(
    "changes",
    [{"image_std": [0.0, 0.2, 0.2]}, {"image_mean": None}, {"image_mean": [float("nan")] * 3}, {"image_std": [1]}],
)
def test_arithmetic_that_is_none(changes: dict, clip: Path) -> None:
    written = json.loads((clip / "preprocessor_config.json").read_text()) | changes
    (clip / "preprocessor_config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match="its image processor") as error:
        load_teacher(str(clip), CPU)
    assert is_one_line(error.value)


def test_a_teacher_with_other_pictures_and_words(clip: Path, tmp_path: Path) -> None:
    processor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}).save_pretrained(clip)
    refused(lambda: load_teacher(str(clip), CPU), tmp_path)
    processor(image_std=[0.0] * 3).save_pretrained(clip)
    refused(lambda: load_teacher(str(clip), CPU), tmp_path)
    processor().save_pretrained(clip)
    load_teacher(str(clip), CPU)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
        (clip / name).unlink(missing_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(clip)
    assert "the token" in refused(lambda: load_teacher(str(clip), CPU), tmp_path)
    more = [*words, *(f"w{number}" for number in range(90))]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(more)}).save_pretrained(clip)
    assert "105 tokens" in refused(lambda: load_teacher(str(clip), CPU), tmp_path)


def test_files_that_are_no_weights(tmp_path: Path, clip: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3\n"
    page = b"\n<!DOCTYPE html><html>Virus scan warning</html>"
    for name, content in {
        "lfs.pt": pointer,
        "page.pth": page,
        "zipped.pt": gzip.compress(page),
        "empty.pt": b"",
        "text.pt": b"not found",
        "lfs.safetensors": pointer,
    }.items():
        (tmp_path / name).write_bytes(content)
        line = refused(lambda name=name: read_weights(f"{tmp_path}/{name}", "model.start"), tmp_path)
        assert "weights_only" not in line
    (clip / "model.safetensors").write_bytes(pointer)
    refused(lambda: load_teacher(str(clip), CPU), tmp_path)
    torch.save({"a.w": torch.ones(2), "a._orig_mod.w": torch.ones(2)}, tmp_path / "two.pt")
    refused(lambda: read_weights(f"{tmp_path}/two.pt", "model.start"), tmp_path)


@given(st.binary(max_size=60))
def test_never_the_advice_to_load_unsafely(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Of a file that torch.save did not write."""
    file = tmp_path_factory.getbasetemp() / "any.pt"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_weights(str(file), "model.start")
    assert is_one_line(error.value)
    assert "weights_only" not in str(error.value)


def test_a_finished_run_that_was_changed(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", 1, teacher=False)
    seal_run(run)
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(lambda: load_teacher(str(run), CPU), tmp_path)
    (run / "model.safetensors").unlink()
    shutil.copy(run / "config.yaml", run / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: its checksum is not that of its manifest"):
        load_model(run, "RUN")
    (run / "checksums.json").write_text("{}")
    refused(lambda: load_teacher(str(run), CPU), tmp_path)
