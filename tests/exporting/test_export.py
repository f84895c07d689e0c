"""Exports of real runs: what others load computes what the run's model does, and comes back for training."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from documented import assert_documented
from exports import PICTURES, TEXTS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from starting import ROOT, losses, program, start

import sacl_ds
from sacl_ds.data.pictures import Picture
from sacl_ds.data.text import pad
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.exporting import export
from sacl_ds.model.saved import load_model
from sacl_ds.model.starts.image import load_image_weights
from sacl_ds.model.teacher import load_teacher

# the built-in encoder; CLIP's, with its first norm and activation; one with all else that is folded into other tensors
ENCODERS = {
    1: "embed_dim: 32, depth: 2, num_heads: 2, patch_size: 16",
    2: "embed_dim: 32, depth: 2, num_heads: 2, patch_size: 16, pre_norm: true, act_layer: quick_gelu",
    3: "embed_dim: 32, depth: 2, num_heads: 2, patch_size: 16, init_values: 0.5, qkv_bias: false, no_embed_class: true",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """run(stage): a run of two ranks at that ZeRO stage, made once."""
    base = tmp_path_factory.mktemp("runs")

    @cache
    def run(stage: int) -> Path:
        folder = base / f"zero{stage}"
        encoder = f"model.image_encoder_arguments={{{ENCODERS[stage]}}}"
        few = ["teacher.steps=0", "train.steps=6", "optim.warmup_steps=0", "optim.lr_image=0.01", "optim.lr_text=0.01"]
        start(folder, *few, encoder, ranks=2, stage=stage)
        return folder

    return run


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, none of them square."""
    folder = tmp_path_factory.mktemp("work")
    g = np.random.default_rng(0)
    for name, (height, width) in zip(PICTURES, [(60, 101), (97, 53), (48, 71)], strict=True):
        coarse = Image.fromarray(g.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
    return folder


def without_this_package(folder: Path, work: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Features and the pipeline's scores, from a process that cannot import sacl_ds."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, ROOT / "tests/support/exports.py", folder, work]
    done = subprocess.run(line, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(work / "found.safetensors"), json.loads((work / "scores.json").read_text())


def own(run: Path, work: Path) -> dict[str, torch.Tensor]:
    """The run's model on the same files, one text and one picture at a time."""
    model, config, tokenizer = load_model(run, "run")
    view = CanonicalView(config.model.image_size)
    images, texts, matches = [], [], []
    with torch.no_grad():
        for name, text in zip(PICTURES, TEXTS, strict=True):
            states, image = model.eval().encode_image(view(Picture((work / name).read_bytes()), ())[None])
            ids = torch.from_numpy(pad(tokenizer.ids([text]), tokenizer.pad_id))
            text_states, feature = model.encode_text(ids, torch.ones_like(ids))
            fused = model.fuse(text_states, torch.ones_like(ids), model.image_tokens(states, text_states[:, 0]))
            images.append(image[0])
            texts.append(feature[0])
            matches.append(model.match_logits(fused).softmax(1)[0, 1])
        scale = model.logit_scale()
    return {
        "image": torch.stack(images), "text": torch.stack(texts), "match": torch.stack(matches), "scale": scale.detach()
    }  # fmt: skip


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_towers_in_a_process_without_this_package(stage: int, runs, work: Path, tmp_path: Path) -> None:
    run = runs(stage)
    export(str(run / "checkpoints/step_00000006"), "hf", tmp_path / "towers")
    found, said = without_this_package(tmp_path / "towers", work)
    expected = own(run, work)
    assert said["class"] == "ChineseCLIPModel"
    assert_close(found["image"], expected["image"])
    assert_close(found["text"], expected["text"])
    logits = expected["scale"] * expected["image"] @ expected["text"].T
    assert_close(found["logits"], logits, 1e-3)
    # three pictures and three texts that are told apart
    assert (expected["image"][0] - expected["image"][1]).abs().max() > 1e-3
    for row, scores in zip(logits.softmax(1), said["scores"], strict=True):
        assert [scores[text] for text in TEXTS] == pytest.approx(row.tolist(), abs=1e-4)


def test_the_tool(runs, tmp_path: Path) -> None:
    done = program("tools/export_checkpoint.py", runs(1), "--to", "hf", "--out", tmp_path / "towers")
    assert re.search(r"^features of both towers equal the run's within \de-0[67], in fp32$", done.stdout, re.M)
    assert re.search(rf"^{tmp_path}/towers: hf, fp32, \d\.\d MB$", done.stdout, re.M)


@pytest.mark.slow
def test_towers_in_bf16(runs, work: Path, tmp_path: Path) -> None:
    export(str(runs(1)), "hf", tmp_path / "towers", "bf16")
    with safe_open(tmp_path / "towers/model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    found, _ = without_this_package(tmp_path / "towers", work)
    expected = own(runs(1), work)
    for name in ("image", "text"):
        assert 1e-5 < (found[name] - expected[name]).abs().max() < 0.03


@pytest.mark.parametrize("stage", [1, 3])
def test_the_whole_model_loads(stage: int, runs, work: Path, tmp_path: Path) -> None:
    """From the run, and from an export that lies elsewhere, with paths, images and tensors alike."""
    run, paths = runs(stage), [work / name for name in PICTURES]
    export(str(run / "checkpoints/step_00000006"), "safetensors", tmp_path / "model")
    expected = own(run, work)
    for folder in (run, shutil.copytree(tmp_path / "model", tmp_path / "moved")):
        model = sacl_ds.load(folder, device="cpu")
        assert_close(model.encode_text(TEXTS), expected["text"])
        assert_close(model.match(paths, TEXTS), expected["match"])
        assert model.logit_scale == pytest.approx(float(expected["scale"]))
        images = [Image.open(path) for path in paths]
        pixels = torch.stack([CanonicalView(48)(Picture(path.read_bytes()), ()) for path in paths])
        for given in (paths, images, [str(path) for path in paths], pixels):
            assert_close(model.encode_image(given, batch_size=2), expected["image"])
        assert_close(model.similarity(paths, TEXTS[:2]), expected["image"] @ expected["text"][:2].T)
        assert model.encode_text([]).shape == (0, 16)
        assert model.match([], []).shape == (0,)
    assert expected["match"].max() - expected["match"].min() > 1e-3


def test_half_precision(runs, work: Path, tmp_path: Path) -> None:
    """Weights in bf16 alone, then products too; the temperature is exact in both."""
    export(str(runs(2)), "safetensors", tmp_path / "model", "bf16")
    tensors, whole = load_file(tmp_path / "model/model.safetensors"), load_file(runs(2) / "model.safetensors")
    assert torch.equal(tensors.pop("logit_scale.log_scale"), whole["logit_scale.log_scale"])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    expected, paths = own(runs(2), work), [work / name for name in PICTURES]
    for dtype, tolerance in ((None, 0.02), ("bfloat16", 0.03), (torch.bfloat16, 0.03)):
        model = sacl_ds.load(tmp_path / "model", "cpu", dtype)
        image, text, match = model.encode_image(paths), model.encode_text(TEXTS), model.match(paths, TEXTS)
        for made, name in ((image, "image"), (text, "text"), (match, "match")):
            assert made.dtype == torch.float32
            assert 0 < (made - expected[name]).abs().max() < tolerance


def test_an_export_is_fine_tuned_pretrained_and_a_teacher(runs, work: Path, tmp_path: Path) -> None:
    run = runs(1)
    export(str(run), "safetensors", tmp_path / "model")
    export(str(run), "hf", tmp_path / "towers")
    few = ["data.scenes.count=200", "data.scenes.eval_count=11", "train.global_batch_size=4", "train.steps=3",
           "train.log_every=1", "train.eval_every=3", "retrieval.rerank=3", "data.workers=0"]  # fmt: skip
    line = ["--task", "retrieval", "--ds_config", "ds_configs/zero2.json", f"output_dir={tmp_path}/tuned", *few]
    program("launch/finetune.py", *line, f"checkpoint={tmp_path}/model")
    tensors = len(load_file(run / "model.safetensors"))
    assert f"start: {tensors} of {tensors} tensors loaded, 0 new" in (tmp_path / "tuned/start.txt").read_text()
    assert len(losses(tmp_path / "tuned")) == 3
    # a fine-tuned run is exported like any other, and evaluated as an export
    export(str(tmp_path / "tuned"), "safetensors", tmp_path / "tuned_model")
    best = own(tmp_path / "tuned", work)
    again = sacl_ds.load(tmp_path / "tuned_model", "cpu")
    assert_close(again.encode_text(TEXTS), best["text"])
    program("launch/evaluate.py", f"checkpoint={tmp_path}/tuned_model", f"output_dir={tmp_path}/judged")
    figures = json.loads((tmp_path / "judged/results.json").read_text())["figures"]
    assert figures == json.loads((tmp_path / "tuned/results.json").read_text())["figures"]
    card = (tmp_path / "tuned_model/README.md").read_text()
    reached = json.loads((tmp_path / "tuned/best.json").read_text())["figures"]["text_to_image_R@1"]
    assert f"| text → image R@1 | {100 * reached:.1f} |" in card

    encoder = f"model.image_encoder_arguments={{{ENCODERS[1]}}}"
    start(tmp_path / "further", f"model.start={tmp_path}/model", f"teacher.checkpoint={tmp_path}/towers", encoder,
          "train.steps=2")  # fmt: skip
    assert f"start: {tensors} of {tensors} tensors loaded, 0 new" in (tmp_path / "further/start.txt").read_text()
    assert losses(tmp_path / "further", "alpha")[0] == 1.0


def test_towers_start_an_image_encoder(runs, tmp_path: Path) -> None:
    """Where they have the first norm of CLIP's; wider ones are refused."""
    for stage in (1, 2):
        export(str(runs(stage)), "hf", tmp_path / f"towers{stage}")
    source, config, _ = load_model(runs(2), "run")
    begun, _, _ = load_model(runs(2), "run")
    for parameter in begun.image_encoder.parameters():
        torch.nn.init.zeros_(parameter)
    vit = config.model.image_encoder
    report = load_image_weights(begun.image_encoder, str(tmp_path / "towers2"), vit)
    assert not report.notes
    for name, tensor in source.image_encoder.state_dict().items():
        assert torch.equal(begun.image_encoder.state_dict()[name], tensor), name
    with pytest.raises(UserError) as error:
        load_image_weights(begun.image_encoder, str(tmp_path / "towers1"), vit)
    line = str(error.value).replace(str(tmp_path / "towers1"), "/data/towers")
    assert_documented(f"error: {line}")


def test_both_forms_are_the_same_teacher(runs, work: Path, tmp_path: Path) -> None:
    export(str(runs(1)), "safetensors", tmp_path / "model")
    export(str(runs(1)), "hf", tmp_path / "towers")
    expected = own(runs(1), work)
    for name in ("model", "towers"):
        teacher = load_teacher(str(tmp_path / name), torch.device("cpu"))
        pixels = torch.stack([teacher.view.image(Picture((work / file).read_bytes()), ()) for file in PICTURES])
        rows = teacher.view.tokenizer.ids([*TEXTS, "circle " * 60])
        assert len(rows[3]) == 32
        ids = torch.from_numpy(pad(rows[:3], teacher.view.tokenizer.pad_id))
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows[:3]])[:, None]).long()
        assert_close(teacher.image_features(pixels), expected["image"])
        assert_close(teacher.text_features(ids, mask), expected["text"])


def test_what_an_export_holds(runs, tmp_path: Path) -> None:
    """Nothing that could run, nothing of the machine that trained it, and the right to read it for others."""
    run = runs(2)
    shutil.copytree(run, tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    shards = ["/secret/cc12m/{0..3}.tar", "https://host/secret/sbu.tar?token=secret"]
    settings["data"] |= {"eval_shards": "pipe:aws s3 cp s3://bucket/val.tar - --profile secret", "shards": shards}
    settings["teacher"] |= {"checkpoint": "/secret/teachers/clip"}
    settings["model"] |= {"image_weights": "/secret/clip", "text_encoder": "google-bert/bert-base-uncased"}
    settings["model"]["max_positions"] = 32
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "run/checksums.json").unlink()
    for form in ("hf", "safetensors"):
        export(str(tmp_path / "run"), form, tmp_path / form)
        files = [path for path in (tmp_path / form).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".safetensors", ".json", ".yaml", ".md"}
        assert (tmp_path / form / "README.md").exists()
        for path in files:
            if path.suffix != ".safetensors":
                assert "secret" not in path.read_text(), path
                assert str(tmp_path) not in path.read_text(), path
        assert len({path.stat().st_mode & 0o777 for path in files}) == 1
    kept = yaml.safe_load((tmp_path / "safetensors/config.yaml").read_text())
    assert kept["data"]["shards"] == ["{0..3}.tar", "sbu.tar"]
    assert kept["data"]["eval_shards"] == "pipe"
    assert kept["teacher"]["checkpoint"] == "clip"
    assert kept["model"]["text_encoder"] == "google-bert/bert-base-uncased"
    assert kept["model"]["image_weights"] is None
    assert kept["train"] == settings["train"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
