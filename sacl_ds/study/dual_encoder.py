"""Dual encoder of the study: transformers over the stem's cells and over words, each pooled into a unit vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sacl_ds.model.sacl import LogitScale
from sacl_ds.study.recognition import CELLS


@dataclass(frozen=True)
class Shape:
    """Sizes of both towers."""

    width: int = 96
    image_layers: int = 1
    text_layers: int = 1
    heads: int = 4
    embed_dim: int = 96


class Tower(nn.Module):
    """Transformer from states (n, L, width) and a mask (n, L) bool to (n, embed_dim) unit vectors."""

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            shape.width, shape.heads, 3 * shape.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(shape.width), enable_nested_tensor=False)
        self.token_head = nn.Sequential(nn.Linear(shape.width, 2 * shape.width), nn.GELU())
        self.projection = nn.Linear(4 * shape.width, shape.embed_dim, bias=False)

    def forward(self, states: Tensor, there: Tensor) -> Tensor:
        states = self.token_head(self.encoder(states, src_key_padding_mask=~there))
        mask = there[..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        # what one token says is kept by the maximum, how often by the mean
        highest = states.masked_fill(~mask, -torch.inf).amax(1)
        return nn.functional.normalize(self.projection(torch.cat([mean, highest], 1)), dim=1)


class DualEncoder(nn.Module):
    def __init__(self, shape: Shape, stem_width: int, vocabulary: int, longest: int, scale: float = 1 / 0.07) -> None:
        super().__init__()
        self.cells = nn.Linear(stem_width, shape.width)
        self.places = nn.Parameter(torch.randn(CELLS, shape.width) * 0.5)
        self.words = nn.Embedding(vocabulary, shape.width)
        self.positions = nn.Parameter(torch.randn(longest, shape.width) * 0.5)
        self.image_tower = Tower(shape, shape.image_layers)
        self.text_tower = Tower(shape, shape.text_layers)
        self.logit_scale = LogitScale(scale)

    def image(self, tokens: Tensor) -> Tensor:
        """Encode pictures, (n, CELLS, stem width) -> (n, embed_dim)."""
        there = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return self.image_tower(self.cells(tokens) + self.places, there)

    def text(self, ids: Tensor) -> Tensor:
        """Encode captions, (n, L) int64, 0 where padded -> (n, embed_dim)."""
        ids = ids[:, : int((ids != 0).sum(1).max())]
        return self.text_tower(self.words(ids) + self.positions[: ids.shape[1]], ids != 0)
