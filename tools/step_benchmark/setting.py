"""Common setting of all compared steps: the model, the precision, and the batch on the device."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from sacl_ds.config import PRESETS, LossConfig, ModelConfig
from sacl_ds.data.batch import Batch, places_of
from sacl_ds.data.text import IGNORED
from sacl_ds.errors import UserError

Captions = Literal["full", "real"]
CAPTION_TOKENS, CAPTION_DEVIATION = 13.9, 3.9  # Flickr8k: 35,000 captions, words, marks, [CLS] and [SEP]
_SHORTEST, _FIRST_WORD, _MASK = 5, 5, 4
_PARTS_OF_TWELVE = (5, 10)  # layers of twelve after which patches are left out


@dataclass(frozen=True)
class BenchmarkSetting:
    """Setting of a comparison.

    batch: pairs over all ranks. ds: what DeepSpeed's file holds. Of our steps alone: micro_batch, pairs that a rank
    passes through the model at once (None: all of its own); checkpoint: activations; compiled: its blocks.
    """

    model: ModelConfig
    batch: int
    precision: Literal["fp32", "bf16"]
    captions: Captions
    ds: dict[str, Any]
    ds_name: str
    device: torch.device
    micro_batch: int | None = None
    checkpoint: bool = False
    compiled: bool = False


def model_config(options: argparse.Namespace) -> ModelConfig:
    """Return the preset's configuration, overridden by the options. Raises UserError."""
    arguments = dict(PRESETS[options.preset]["image_encoder_arguments"])
    names = {
        "embed_dim": options.width,
        "depth": options.depth,
        "num_heads": options.heads,
        "patch_size": options.patch,
    }
    arguments |= {name: value for name, value in names.items() if value}
    depth = arguments.get("depth", 12)
    given = {
        "text_width": options.width,
        "text_heads": options.heads,
        "image_size": options.image_size,
        "text_layers": options.text_layers,
        "fusion_layers": options.fusion_layers,
        "embed_dim": options.embed_dim,
        "max_tokens": options.max_tokens,
    }
    values = {
        "preset": options.preset,
        "image_encoder_arguments": arguments,
        "image_pretrained": False,
        "text_encoder": None,
        "patch_selection": {"layers": sorted({max(1, depth * part // 12) for part in _PARTS_OF_TWELVE})},
        **{name: value for name, value in given.items() if value},
    }
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def lengths(captions: Captions, pairs: int, longest: int, generator: torch.Generator) -> Tensor:
    """(pairs,) int64 tokens of captions: all `longest`, or as of a captioned set."""
    if captions == "full":
        return torch.full((pairs,), longest)
    drawn = CAPTION_TOKENS + CAPTION_DEVIATION * torch.randn(pairs, generator=generator)
    return drawn.round().long().clamp(min(_SHORTEST, longest), longest)


def random_batch(setting: BenchmarkSetting, pairs: int, rank: int) -> Batch:
    """Draw a rank's part of a batch, on the host: texts padded to the longest, MLM's share of their tokens masked."""
    model, g = setting.model, torch.Generator().manual_seed(rank)
    tokens = lengths(setting.captions, pairs, model.max_tokens, g)
    places = torch.arange(int(tokens.max()))
    mask = (places < tokens[:, None]).long()
    ids = torch.randint(_FIRST_WORD, model.vocab_size, mask.shape, generator=g) * mask
    predicted = (LossConfig().mlm_probability * (tokens - 2)).round().clamp(min=1)
    chosen = (places > 0) & (places <= predicted[:, None])
    labels = ids.masked_fill(~chosen, IGNORED)
    size = model.image_size
    return Batch(
        keys=[""] * pairs,
        captions=[""] * pairs,
        shards=[""] * pairs,
        images=torch.randint(0, 256, (pairs, 3, size, size), generator=g, dtype=torch.uint8),
        input_ids=ids,
        attention_mask=mask,
        pair_ids=(rank * pairs + torch.arange(pairs))[:, None],
        masked_ids=ids.masked_fill(chosen, _MASK),
        mlm_labels=labels,
        token_places=places_of(mask),
        mlm_places=places_of(labels != IGNORED),
        teacher_features=torch.randn(pairs, 2, model.embed_dim, generator=g).half(),
    )
