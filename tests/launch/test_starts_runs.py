"""Starts in whole runs: said once, kept in start.txt, and needed no more when the run is resumed or started from."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from starting import start
from tiny import varied
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPVisionConfig, CLIPVisionModel

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "on", "left", "of"]
SHORT = ["teacher.steps=0", "train.eval_every=null"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/ and bert/, as their libraries save them."""
    folder = tmp_path_factory.mktemp("sources")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128}
    clip = CLIPVisionConfig(num_hidden_layers=2, image_size=32, patch_size=16, **sizes)
    varied(CLIPVisionModel(clip)).save_pretrained(folder / "clip")
    bert = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=40, num_hidden_layers=3, **sizes)
    varied(BertModel(bert)).save_pretrained(folder / "bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    return folder


def test_a_run_says_what_it_started_from(sources: Path, tmp_path: Path) -> None:
    """On two ranks, once; then it is resumed without its sources, and is itself a start at another resolution."""
    gone = tmp_path / "sources"
    shutil.copytree(sources, gone)
    arguments = [
        *SHORT,
        "model.image_encoder=vit_base_patch16_clip_quickgelu_224",
        "model.image_encoder_arguments={embed_dim: 32, depth: 2, num_heads: 2, patch_size: 16}",
        f"model.image_weights={gone}/clip",
        f"model.text_encoder={gone}/bert",
    ]
    done = start(tmp_path / "run", *arguments, "train.steps=2", ranks=2)
    text = (tmp_path / "run/start.txt").read_text()
    assert done.stdout.count(text) == 1
    lines = text.splitlines()
    assert lines[1] == f"model.image_weights={gone}/clip"
    assert "  note: position embeddings interpolated from 2 × 2 patches to 3 × 3" in lines
    assert f"model.text_encoder={gone}/bert" in lines
    assert lines[-2:] == [
        "no source",
        "  new, 5: image_projection.weight, text_projection.weight, logit_scale.log_scale, matching_head.* (2)",
    ]
    # two steps of a warm-up move nothing far
    weights = load_file(tmp_path / "run/model.safetensors")
    clip, bert = (load_file(gone / f"{name}/model.safetensors") for name in ("clip", "bert"))
    for ours, theirs in (
        (weights["image_encoder.vit.cls_token"][0, 0], clip["embeddings.class_embedding"]),
        (weights["fusion_encoder.encoder.layer.0.output.dense.weight"], bert["encoder.layer.2.output.dense.weight"]),
        (
            weights["text_encoder.bert.embeddings.position_embeddings.weight"],
            bert["embeddings.position_embeddings.weight"],
        ),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)

    shutil.rmtree(gone)
    start(tmp_path / "run", *arguments, "train.steps=3", "--resume")
    assert (tmp_path / "run/start.txt").read_text() == text

    more = [f"model.start={tmp_path}/run", "model.image_size=64", "train.steps=1"]
    start(tmp_path / "next", *arguments[:-2], *more)
    said = (tmp_path / "next/start.txt").read_text()
    assert "0 new\n" in said
    assert "position embeddings interpolated from 3 × 3 patches to 4 × 4" in said
    tokenizers = [(tmp_path / f"{name}/tokenizer/tokenizer.json").read_bytes() for name in ("next", "run")]
    assert tokenizers[0] == tokenizers[1]
    after, before = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("next", "run"))
    name = "matching_head.weight"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-3)
