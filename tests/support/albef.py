"""ALBEF's checkpoint, built from a ViT of timm and a BERT of transformers under ALBEF's names."""

from __future__ import annotations

import timm
import torch
from tiny import varied
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

VIT = "vit_base_patch16_224"
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
TEXT_LAYERS, LAYERS, WIDTH, VOCABULARY, SHARED = 2, 4, 24, 50, 16


def bert_config(**changes: object) -> BertConfig:
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH}
    return BertConfig(**{"vocab_size": VOCABULARY, "hidden_size": WIDTH, **sizes, **changes})


class Albef:
    """The parts, and `checkpoint`: what its training saves."""

    def __init__(self, size: int = 32) -> None:
        self.vit = varied(timm.create_model(VIT, img_size=size, num_classes=0, **SIZES), 1)
        self.bert = varied(BertForMaskedLM(bert_config()), 2)
        crossed = BertForMaskedLM(bert_config(is_decoder=True, add_cross_attention=True))
        self.crossed = varied(crossed, 3)  # of which the cross-attention is taken
        for layer in self.crossed.bert.encoder.layer:
            for part in ("key", "value"):
                setattr(layer.crossattention.self, part, varied(nn.Linear(32, WIDTH), 4))
        g = torch.Generator().manual_seed(6)
        self.heads = {
            "vision_proj.weight": torch.randn(SHARED, 32, generator=g),
            "vision_proj.bias": torch.randn(SHARED, generator=g),
            "text_proj.weight": torch.randn(SHARED, WIDTH, generator=g),
            "text_proj.bias": torch.randn(SHARED, generator=g),
            "itm_head.weight": torch.randn(2, WIDTH, generator=g),
            "itm_head.bias": torch.randn(2, generator=g),
            "temp": torch.tensor(0.0625),
        }

    def checkpoint(self, fine_tuned: bool = False) -> dict[str, object]:
        text = dict(self.bert.state_dict())
        for name, value in self.crossed.state_dict().items():
            if "crossattention" in name and int(name.split(".")[3]) >= TEXT_LAYERS:
                text[name] = value
        text["bert.embeddings.position_ids"] = torch.arange(512)[None]
        if fine_tuned:
            text = {name.removeprefix("bert."): value for name, value in text.items() if not name.startswith("cls.")}
        state: dict[str, Tensor] = {f"visual_encoder.{name}": value for name, value in self.vit.state_dict().items()}
        state |= {f"text_encoder.{name}": value for name, value in text.items()} | self.heads
        state |= {f"visual_encoder_m.{name}": value + 1 for name, value in self.vit.state_dict().items()}
        state |= {f"text_encoder_m.{name}": value for name, value in text.items()}
        state |= {f"{name}_proj_m.{part}": torch.ones(2) for name in ("vision", "text") for part in ("weight", "bias")}
        state |= {"image_queue": torch.ones(SHARED, 8), "text_queue": torch.ones(SHARED, 8), "queue_ptr": torch.ones(1)}
        return {"model": state, "optimizer": {"state": {}}, "epoch": 29, "config": {"image_res": 256}}
