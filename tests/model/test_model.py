"""The model's parts: attention in both directions, the temperature's bounds, starts from saved models."""

from pathlib import Path

import pytest
import timm
import tiny
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from sacl_ds.config import ModelConfig
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import LogitScale, SaclModel
from sacl_ds.model.starts.text import load_bert


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("part", ["text", "fusion"])
def test_the_first_token_sees_the_last(part: str, padding: int) -> None:
    """And never the padding: transformers makes a layer with cross-attention causal, silently so without a mask."""
    model = tiny.objective(tiny.config()).model.eval()
    batch, _ = tiny.batch(2)
    ids = batch.input_ids[:1, :8].clamp(min=5)
    mask = torch.ones_like(ids)
    mask[:, 8 - padding :] = 0
    image = torch.randn(1, 5, 32)

    @torch.no_grad()
    def first_token(ids: torch.Tensor) -> torch.Tensor:
        if part == "text":
            return model.text_encoder(ids, mask)[0, 0]
        states = model.text_encoder.bert.embeddings(input_ids=ids)  # so that only the fusion half mixes tokens
        return model.fuse(states, mask, image)[0, 0]

    def changed(position: int) -> float:
        other = ids.clone()
        other[0, position] = 4
        return float((first_token(ids) - first_token(other)).abs().max())

    assert changed(7 - padding) > 1e-4
    if padding:
        assert changed(7) == 0


def test_fusion_sees_the_image() -> None:
    model = tiny.objective(tiny.config()).model.eval()
    states, mask = torch.randn(1, 6, 24), torch.ones(1, 6, dtype=torch.long)
    image = torch.randn(1, 5, 32)
    other = image.clone()
    other[0, 4] += 1
    assert (model.fuse(states, mask, image) - model.fuse(states, mask, other)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("start", "sign", "moves"), [(101.0, 1, False), (101.0, -1, True), (0.9, -1, False), (0.9, 1, True)]
)
def test_logit_scale_stays_in_bounds_and_returns(start: float, sign: int, moves: bool) -> None:
    """sign: which way a step along the negative gradient would move the scale."""
    scale = LogitScale(start)
    value = scale()
    assert 1.0 <= value.item() <= 100.0001
    (-sign * value).backward()
    assert (scale.log_scale.grad.abs().sum() > 0) == moves
    assert scale.log_scale.shape == (1,)


def test_starts_from_a_bert_folder(tmp_path: Path) -> None:
    """Text and fusion together compute what BERT computes where cross-attention adds nothing."""
    config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96)
    torch.manual_seed(3)
    bert = BertForMaskedLM(config).eval()
    for layer in bert.bert.encoder.layer:
        torch.nn.init.normal_(layer.intermediate.dense.weight, std=0.3)
    bert.save_pretrained(tmp_path)
    settings = model_config(str(tmp_path))
    model = SaclModel(settings, 50, pretrained=False).eval()
    load_bert(model, str(tmp_path))
    for layer in model.fusion_encoder.encoder.layer:
        # a residual around nothing, then the layer norm: undone by taking the block out
        layer.crossattention = torch.nn.Identity()
        layer.is_decoder = False
    ids = torch.randint(5, 50, (2, 7))
    mask = torch.ones_like(ids)
    states, _ = model.encode_text(ids, mask)
    fused = model.fuse(states, mask, torch.zeros(2, 1, 32))
    torch.testing.assert_close(
        model.token_logits(fused), bert(input_ids=ids, attention_mask=mask).logits, rtol=0, atol=1e-5
    )


def model_config(text_encoder: str, **changes: object) -> ModelConfig:
    values = {**tiny.config().model.model_dump(), "text_layers": 1, "fusion_layers": 2, "text_encoder": text_encoder}
    return ModelConfig.model_validate(values | changes)


def test_a_bert_that_does_not_fit(tmp_path: Path) -> None:
    BertForMaskedLM(
        BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 2 layers"):
        load_bert(SaclModel(model_config(str(tmp_path)), 50, pretrained=False), str(tmp_path))
    with pytest.raises(UserError, match=r"set model\.text_width=24"):
        wide = model_config(str(tmp_path), fusion_layers=1, text_width=48)
        load_bert(SaclModel(wide, 50, pretrained=False), str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        load_bert(SaclModel(model_config("x"), 50, pretrained=False), str(tmp_path / "nothing"))


def test_starts_from_a_timm_folder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    arguments = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **arguments)
    timm.models.save_for_hf(vit, str(tmp_path), model_args={"img_size": 32, **arguments}, safe_serialization=True)
    torch.manual_seed(2)
    settings = ModelConfig.model_validate(
        {
            **tiny.config().model.model_dump(),
            "image_encoder": f"local-dir:{tmp_path}",
            "image_encoder_arguments": {},
            "image_pretrained": True,
        }
    )
    model = SaclModel(settings, 50, pretrained=True).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalised = (images - model.image_encoder.mean) / model.image_encoder.std
    torch.testing.assert_close(model.encode_image(images)[0].tokens, vit.eval().forward_features(normalised))


def test_unknown_image_encoder() -> None:
    settings = ModelConfig.model_validate({**tiny.config().model.model_dump(), "image_encoder": "vit_nothing"})
    with pytest.raises(UserError, match="vit_nothing"):
        SaclModel(settings, 50, pretrained=False)


def test_tokenizer_round_trip_and_bert_folder(tmp_path: Path) -> None:
    tokenizer = Tokenizer(train_wordpiece(["a red circle", "a blue square and a red ring"] * 3, 100), 6)
    tokenizer.save(tmp_path / "own")
    again = Tokenizer.load(tmp_path / "own", 6)
    text = ["a RED square", "a blue circle and a red ring and more"]
    assert tokenizer.ids(text) == again.ids(text)
    assert tokenizer.fingerprint == again.fingerprint != Tokenizer.load(tmp_path / "own", 7).fingerprint
    assert max(len(row) for row in again.ids(text)) == 6
    assert again.fast.decode(again.ids(["red circle"])[0]) == "[CLS] red circle [SEP]"
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle"]))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    assert Tokenizer.load(tmp_path / "bert", 8).ids(["Red circle blob"]) == [[2, 5, 6, 1, 3]]
    with pytest.raises(UserError, match=r"tokenizer=.*no such folder"):
        Tokenizer.load(tmp_path / "none", 6)
