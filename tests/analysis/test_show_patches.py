"""tools/show_patches.py on a saved run: what it draws is what the model keeps."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from patch_encoder import encoder, pixels, texts
from PIL import Image
from saved import saved_run
from starting import program

from sacl_ds.analysis.patches import dimmed, load_selecting, look
from sacl_ds.command_line import exit_status
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.errors import UserError

CAPTIONS = ["a red circle", "there is a blue cross at the left"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("runs") / "run", 0, teacher=False)


def test_scenes_and_a_file(run: Path, tmp_path: Path) -> None:
    out, photograph = tmp_path / "patches.png", tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(photograph)
    chosen = ["--placement", "tower", "--layers", "1", "--keep-rate", "0.5"]
    pictures = ["--scenes", "3", "--image", photograph, "--captions", *CAPTIONS]
    program("tools/show_patches.py", run, *pictures, *chosen, "--out", out)
    drawn = np.asarray(Image.open(out).convert("RGB")).astype(int)
    height, width = drawn.shape[:2]
    assert width > height > 400
    assert (np.abs(drawn - [255, 127, 14]).max(2) < 8).sum() > 100, "no patch stands out as one caption's alone"


@pytest.mark.parametrize("placement", ["tower", "output", "published"])
def test_the_places_are_those_of_the_model(run: Path, placement: str) -> None:
    settings = [f"placement={placement}", "layers=[1]", "keep_rate=0.5"]
    model, tokenizer = load_selecting(run, settings)
    picture = torch.from_numpy(Scenes(9, 1001, 48).image(3)).permute(2, 0, 1)
    looked = look(model, tokenizer, picture.expand(2, -1, -1, -1), CAPTIONS)
    ids = tokenizer.ids(CAPTIONS)
    states, _ = model.encode_text(torch.from_numpy(pad(ids, tokenizer.pad_id)), torch.from_numpy(attention_mask(ids)))
    states = model.image_encoder(picture.expand(2, -1, -1, -1), states[:, 0])
    assert [one.choices[-1].places.tolist() for one in looked] == states.places.tolist()
    for one in looked:
        choice = one.choices[-1]
        best = choice.scores.topk(5).indices.sort().values
        assert choice.places.tolist() == best.tolist()
        assert choice.among.tolist() == list(range(9))
        shown = dimmed(one.pixels, choice.places, 16)
        whole = one.pixels.permute(1, 2, 0).numpy() / 255
        same = np.array([
            np.allclose(shown[y : y + 16, x : x + 16], whole[y : y + 16, x : x + 16])
            for y in (0, 16, 32) for x in (0, 16, 32)
        ])  # fmt: skip
        assert np.flatnonzero(same).tolist() == choice.places.tolist()


def test_later_layers_choose_among_what_earlier_ones_kept() -> None:
    """In an encoder of three layers, the last of which sees a fused token as well."""
    made = encoder("tower", layers=[1, 3], keep_rate=0.5)
    record: list = []
    states = made(pixels(2), texts(2), record)
    first, second = record
    assert (first.layer, second.layer) == (1, 3)
    assert torch.equal(second.among, first.places)
    assert torch.equal(second.places, states.places)
    assert first.scores.shape == (2, 16)
    assert second.scores.shape == (2, 9)
    for row in range(2):
        assert set(second.places[row].tolist()) < set(first.places[row].tolist())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--scenes", 1], "without patch selection .placement=none.*--placement tower --layers 1, of its 1 layers"),
        (["--scenes", 1, "--placement", "tower"], "no layer 10 in its 1; set model.patch_selection.layers"),
        (["--scenes", 900, "--placement", "output"], "--scenes 900: there are 500"),
        (["--placement", "output"], "no picture to look at; name some"),
        (["--image", "missing.jpg", "--captions", "a", "--placement", "output"], "--image missing.jpg: No such file"),
        (["--image", "README.md", "--captions", "a", "--placement", "output"], "--image README.md: not an image; give"),
        (["--scenes", 1, 2, 3, "--captions", "a", "--captions", "b", "--placement", "output"], "2 --captions for 3"),
        (["--scenes", 1, "--placement", "output", "--keep-rate", "0"], "keep_rate=0.0 keeps no patch"),
    ],
)
def test_mistakes_in_one_line(
    root: Path, run: Path, tmp_path: Path, arguments: list, line: str, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(
        sys, "argv", ["show_patches.py", str(run), *map(str, arguments), "--out", str(tmp_path / "p.png")]
    )
    main = runpy.run_path("tools/show_patches.py")["main"]
    assert exit_status(main) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(line, said), said


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the directory of a finished run"):
        load_selecting(tmp_path, [])
