"""Costs by formula against torch's own counter, autograd's own storage, and parameters as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from four_layers import PREDICTED, VOCABULARY, Held, batch, config, similarities
from presets_page import page
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from sacl_ds.config import LossConfig, ModelConfig
from sacl_ds.errors import UserError
from sacl_ds.model.cost import BACKWARD, Cost, ModelCost
from sacl_ds.model.sacl import SaclModel
from sacl_ds.training.objective import PretrainObjective, Targets

CASES: dict[str, dict[str, Any]] = {
    "none": {"placement": "none"},
    "tower": {"placement": "tower"},
    "tower, tokens": {"placement": "tower", "score": "tokens"},
    "tower, cls": {"placement": "tower", "guide": "cls"},
    "tower, random, last layer": {"placement": "tower", "guide": "random", "layers": [4]},
    "tower, nothing left out": {"placement": "tower", "keep_rate": 1.0},
    "tower, one patch left": {"placement": "tower", "keep_rate": 0.01, "layers": [1, 2, 3]},
    "output": {"placement": "output"},
    "output, tokens": {"placement": "output", "score": "tokens"},
    "output, cls": {"placement": "output", "guide": "cls"},
    "output, nothing left out": {"placement": "output", "keep_rate": 1.0},
    "published": {"placement": "published"},
    "published, half": {"placement": "published", "keep_rate": 0.5, "layers": [1, 3]},
}


def build(described: ModelConfig) -> tuple[SaclModel, ModelCost]:
    torch.manual_seed(0)
    cost = ModelCost(described, predicted=PREDICTED, vocab_size=VOCABULARY)
    return SaclModel(described, VOCABULARY, pretrained=False), cost


def pretraining(model: SaclModel, pairs: int) -> tuple[int, int, int]:
    """FLOPs of forward, of forward and backward, and bytes held, of a step."""
    objective, held = PretrainObjective(model, LossConfig()), Held(model)
    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(held.pack, lambda tensor: tensor):
        targets = Targets(None, 0.0, torch.Generator().manual_seed(2))
        losses = objective(batch(pairs), targets)
        forward = counter.get_total_flops()
        losses["loss"].backward()
    return forward, counter.get_total_flops(), held.bytes


@pytest.mark.parametrize("name", CASES)
def test_pretraining_step(name: str) -> None:
    """FLOPs to the last one; backward within 5 % (pixels have no gradient, attention computed again); bytes in 2 %."""
    model, cost = build(config(CASES[name]))
    expected = cost.pretraining()
    forward, both, few = pretraining(model, 4)
    assert forward == 4 * expected.flops + similarities(4)
    assert both == pytest.approx(BACKWARD * forward, rel=0.05)
    more = pretraining(model, 8)
    assert more[0] == 8 * expected.flops + similarities(8)
    assert expected.bytes == pytest.approx((more[2] - few) / 4, rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_one_pairing(name: str) -> None:
    model, cost = build(config(CASES[name]))
    used, held, counter = batch(3), Held(model), FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(held.pack, lambda tensor: tensor):
        states = model.text_encoder(used.input_ids, used.attention_mask)
        tokens = model.image_encoder(used.images, states[:, 0]).tokens
        fused = model.fuse(states, used.attention_mask, tokens)
    assert counter.get_total_flops() == 3 * cost.pairing().flops
    assert held.bytes == pytest.approx(3 * cost.pairing().bytes, rel=0.02)
    assert fused.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_reranking(name: str) -> None:
    """Two images, each with its three texts."""
    model, cost = build(config(CASES[name]))
    used, counter = batch(6), FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        images, _ = model.encode_image(used.images[:2])
        states, _ = model.encode_text(used.input_ids, used.attention_mask)
        tokens = model.image_tokens(images, states[:, 0], torch.arange(6) // 3)
        model.match_logits(model.fuse(states, used.attention_mask, tokens))
    assert counter.get_total_flops() == 2 * cost.reranking(3).flops


@pytest.mark.parametrize(("encoder", "size"), [("vit_base_patch16_clip_224.openai", 48), ("vit_tiny_patch16_224", 56)])
@pytest.mark.parametrize("placement", ["none", "tower"])
def test_another_transformer_size_and_width_of_text(encoder: str, size: int, placement: str) -> None:
    """A norm before the layers; a text that is wider than the image, where nothing is selected."""
    wider = {"text_width": 96} if placement == "none" else {}
    model, cost = build(config({"placement": placement}, image_encoder=encoder, image_size=size, **wider))
    used, counter = batch(2, size), FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        states = model.text_encoder(used.input_ids, used.attention_mask)
        model.fuse(states, used.attention_mask, model.image_encoder(used.images, states[:, 0]).tokens)
    assert counter.get_total_flops() == 2 * cost.pairing().flops
    assert cost.parameters()["all"] == sum(p.numel() for p in model.parameters())


def test_parameters_of_base() -> None:
    """By hand: ViT-B/16 with a norm before its layers at 256 px, BERT-base split 6/6, projections, heads."""
    w, patches, vocabulary = 768, 256, 30522
    norm, dense = 2 * w, w * w + w
    vit_layer = 2 * norm + (3 * w * w + 3 * w) + dense + (4 * w * w + 4 * w) + (4 * w * w + w)
    image = (3 * 16 * 16 * w) + w + (1 + patches) * w + norm + 12 * vit_layer + norm
    bert_layer = 4 * dense + norm + (4 * w * w + 4 * w) + (4 * w * w + w) + norm
    text = (vocabulary + 512 + 2) * w + norm + 6 * bert_layer
    fusion = 6 * (bert_layer + 4 * dense + norm)
    heads = 2 * w * 256 + 1 + (2 * w + 2) + dense + norm + vocabulary
    found = ModelCost(ModelConfig.model_validate({"preset": "base"})).parameters()
    assert found == {"image": image, "text": text, "fusion": fusion, "heads": heads,
                     "all": image + text + fusion + heads}  # fmt: skip


def test_parameters_of_tiny() -> None:
    described = ModelConfig.model_validate({"preset": "tiny"})
    model = SaclModel(described, described.vocab_size, pretrained=False)
    assert ModelCost(described).parameters()["all"] == sum(p.numel() for p in model.parameters())


def test_costs_add_up() -> None:
    assert 2 * Cost(3, 1) + Cost(1, 1) == Cost(7, 3)
    assert Cost(1, 2).bytes == 8


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_r26_s32_224"])
def test_an_encoder_of_unknown_cost_says_so(name: str) -> None:
    described = config({}, image_encoder=name, image_encoder_arguments={}, image_size=224)
    with pytest.raises(UserError, match=f"{name}.*costs are known for a VisionTransformer") as error:
        ModelCost(described)
    assert "\n" not in str(error.value)


def test_the_page_in_docs_is_what_the_command_prints(root: Path) -> None:
    assert (root / "docs/lab/presets.md").read_text() == page(), "python -m presets_page docs/lab/presets.md"
