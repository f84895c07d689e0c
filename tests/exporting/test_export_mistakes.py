"""What exporting and loading refuse, as it is printed and documented; and that nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from documented import assert_documented
from PIL import Image
from saved import saved_run
from starting import ROOT, program

import sacl_ds
from sacl_ds.command_line import exit_status
from sacl_ds.errors import UserError
from sacl_ds.exporting import export
from sacl_ds.exporting.card import card, last_name, read_source
from sacl_ds.exporting.export import new_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("base") / "run", seed=3, teacher=False)


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """said(*arguments): what the tool prints for them on stderr, with the test's folder shown as /data."""

    def call(*arguments: str | Path, status: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["export_checkpoint.py", *map(str, arguments)])
        main = runpy.run_path(str(ROOT / "tools/export_checkpoint.py"), run_name="tool")["main"]
        assert exit_status(main) == status
        return capsys.readouterr().err.replace(str(tmp_path), "/data").rstrip("\n")

    return call


def changed(run: Path, folder: Path, **settings: object) -> Path:
    """The run's configuration, files and weights, with other settings of the model."""
    folder.mkdir()
    for file in run.iterdir():
        if file.name != "config.yaml":
            (folder / file.name).symlink_to(file)
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"] |= settings
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_a_folder_in_use(run: Path, said: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    line = said(str(run), "--to", "hf", "--out", str(tmp_path / "out"))
    assert_documented(line)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_is_no_run(run: Path, said: Callable[..., str], tmp_path: Path) -> None:
    out = ("--to", "safetensors", "--out", str(tmp_path / "out"))
    lines = [said(str(tmp_path / "nowhere"), *out), said(str(tmp_path), *out)]
    (tmp_path / "vqa").mkdir()
    values = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "vqa/config.yaml").write_text(yaml.safe_dump(values | {"task": "vqa"}))
    for name in ("tokenizer", "model.safetensors"):
        (tmp_path / "vqa" / name).symlink_to(run / name)
    lines.append(said(str(tmp_path / "vqa"), *out))
    for line in lines:
        assert_documented(line)
    assert not (tmp_path / "out").exists()


def test_towers_that_the_class_cannot_hold(run: Path, said: Callable[..., str], tmp_path: Path) -> None:
    selection = {"placement": "tower", "layers": [1], "guide": "cls"}
    by_cls = changed(run, tmp_path / "cls", patch_selection=selection)
    line = said(str(by_cls), "--to", "hf", "--out", str(tmp_path / "out"))
    assert_documented(line)
    assert not list(tmp_path.glob(".*"))
    relu = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 16, "act_layer": "relu"}
    line = said(
        str(changed(run, tmp_path / "relu", image_encoder_arguments=relu)),
        *("--to", "hf", "--out", str(tmp_path / "out")),
    )
    assert_documented(line)
    # as the lines advise
    assert said(by_cls, "--to", "safetensors", "--out", tmp_path / "out", status=0) == ""
    assert sacl_ds.load(tmp_path / "out", "cpu").encode_text(["a circle"]).shape == (1, 16)


def test_guided_by_texts_the_towers_are_as_ever(run: Path, said: Callable[..., str], tmp_path: Path) -> None:
    """Features see no text, so nothing is left out of them."""
    by_text = changed(run, tmp_path / "text", patch_selection={"placement": "tower", "layers": [1]})
    assert said(by_text, "--to", "hf", "--out", tmp_path / "out", status=0) == ""
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_form_that_there_is_not(run: Path, said: Callable[..., str], tmp_path: Path) -> None:
    line = said(run, "--to", "onnx", "--out", tmp_path / "out")
    assert line.startswith("error: argument --to: invalid choice: 'onnx' (choose from")
    assert line.endswith("see --help")


def test_loading(run: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (60, 50)).save(tmp_path / "fine.png")
    model = sacl_ds.load(run, "cpu")
    calls = [
        lambda: sacl_ds.load(tmp_path / "nowhere"),
        lambda: sacl_ds.load(tmp_path / "hf"),
        lambda: sacl_ds.load(run, dtype="int8"),
        lambda: model.encode_image([tmp_path / "fine.png", tmp_path / "broken.jpg"]),
        lambda: model.encode_image([tmp_path / "none.jpg"]),
        lambda: model.encode_image(tmp_path / "fine.png"),
        lambda: model.encode_image([7]),
        lambda: model.encode_image(torch.zeros(1, 3, 48, 48)),
        lambda: model.encode_text("a circle"),
        lambda: model.match([tmp_path / "fine.png"], ["a circle", "a cross"]),
    ]
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        line = str(error.value).replace(str(tmp_path), "/data")
        assert "\n" not in line
        assert_documented(f"UserError: {line}")
    with pytest.raises(UserError, match="no such device"):
        sacl_ds.load(run, device="gpu7")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    line = r"^--out .*/out cannot be written: No space left on device; make room"
    with pytest.raises(UserError, match=line), new_folder(tmp_path / "out", "--out") as folder:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out", "--out") as folder:
        (folder / "whole").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_somebody_was_faster(tmp_path: Path) -> None:
    line = "is there already, and nothing is overwritten"
    with pytest.raises(UserError, match=line), new_folder(tmp_path / "out", "--out") as folder:
        (folder / "mine").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").write_text("theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_killed_while_writing_there_is_no_export(run: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, os, signal
from pathlib import Path
from sacl_ds.exporting import export
importlib.import_module("sacl_ds.exporting.export")._release = lambda path: os.kill(os.getpid(), signal.SIGKILL)
export({str(run)!r}, "safetensors", Path({str(tmp_path / "out")!r}))
"""
    (tmp_path / "killed.py").write_text(code)
    assert program(str(tmp_path / "killed.py"), check=False).returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".*"))  # what it had written by then
    assert not (tmp_path / "out").exists()
    # the next attempt is not in its way
    export(str(run), "safetensors", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_the_card_holds_what_users_wrote_as_text(run: Path, tmp_path: Path) -> None:
    """Names of files are no Markdown, no HTML, no YAML and no code."""
    wild = "a`b``c|d<script>alert(1)</script>\n---\nlicense: mit"
    shards = "/data/![x](http://host/y.png)`.tar"
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["data"] |= {"source": "shards", "shards": [shards, wild]}
    values["teacher"] = {"checkpoint": "/x/</td>`teacher"}
    source = read_source(str(run))
    source = type(source)(**{**vars(source), "settings": values, "figures": {"a|b<i>_R@1": 0.5}})
    text = card(source, "safetensors", "fp32", 'we"ird *name*', widened=False)
    front, body = text.split("---\n", 2)[1:]
    assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags"}
    assert 'load("we_ird__name_")' in body
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"```.*?```", "", body, flags=re.S))
    assert not re.findall(r"(?<!\\)[<*!`]", outside.replace("*Vision", "Vision").replace("Regulation*", "")
                          .replace("\n* ", "\n")), outside  # fmt: skip
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {3, 4}
    assert "| a\\|b\\<i\\> R@1 | 50.0 |" in body


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/data/cc12m/{00000..01242}.tar", "{00000..01242}.tar"),
        ("https://user:secret@host/a/b.tar?token=secret", "b.tar"),
        ("pipe:aws s3 cp s3://secret/x.tar -", "pipe"),
        ("/", "."),
    ],
)
def test_last_names(place: str, name: str) -> None:
    assert last_name(place) == name


def test_an_encoder_described_in_a_folder_of_timm(tmp_path: Path, run: Path) -> None:
    """The export needs that folder no more."""
    (tmp_path / "timm").mkdir()
    said = {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    (tmp_path / "timm/config.json").write_text(json.dumps(said | {"num_classes": 0, "pretrained_cfg": {}}))
    local = changed(run, tmp_path / "run", image_encoder=f"local-dir:{tmp_path}/timm", image_encoder_arguments={})
    export(str(local), "safetensors", tmp_path / "out")
    (tmp_path / "timm/config.json").unlink()
    picture = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    expected = sacl_ds.load(run, "cpu").encode_image(picture)
    assert torch.equal(sacl_ds.load(tmp_path / "out", "cpu").encode_image(picture), expected)
