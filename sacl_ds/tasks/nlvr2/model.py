"""NLVR2 model, as ALBEF builds it: the text looks at one image, then at the other, in every layer of the fusion.

A pre-trained fusion layer becomes two blocks, the first with cross-attention to the left image, the second to the right
one. Both start as copies of it; keys and values of both images come from one pair of projections.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.models.bert.modeling_bert import BertLayer

from sacl_ds.config import ModelConfig
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.text import split_heads
from sacl_ds.tasks.nlvr2.data import StatementBatch


class Nlvr2Model(nn.Module):
    """Classifier of a sentence as true or false of two images. b: pairs of images, L: text tokens with [CLS] first."""

    def __init__(self, start: SaclModel, config: ModelConfig) -> None:
        """Take over the encoders of `start`, which config describes; its projections and heads are left out."""
        super().__init__()
        self.image_encoder, self.text_encoder = start.image_encoder, start.text_encoder
        self.fusion_encoder = PairFusionEncoder(start.fusion_encoder.encoder.layer)
        width = config.text_width
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def checkpoint_activations(self, on: bool = True) -> None:
        """Set whether backward recomputes the activations of the encoders' blocks instead of storing them."""
        for part in (self.image_encoder, self.text_encoder, self.fusion_encoder):
            part.checkpoint_activations(on)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Run each block of image and text encoder compiled by torch.compile; the fusion of two images runs as it
        is."""
        for part in (self.image_encoder, self.text_encoder):
            part.compile_layers(backend)

    def forward(self, left: Tensor, right: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """left, right (b, 3, H, W) uint8, input_ids and attention_mask (b, L) int64 -> (b, 2) float32 logits; index 1
        means that the sentence is true. Where patches are selected, the sentence's [CLS] state selects them."""
        states = self.text_encoder(input_ids, attention_mask)
        guide = states[:, 0].repeat(2, 1)
        image_tokens = self.image_encoder(torch.cat([left, right]), guide).tokens
        fused = self.fusion_encoder(states, attention_mask, image_tokens)
        return self.classifier(fused[:, 0]).float()


class PairFusionEncoder(nn.Module):
    """Fusion encoder whose text states attend to two images."""

    def __init__(self, layers: nn.ModuleList) -> None:
        """Copy the layers. layers: BertLayers of a `FusionEncoder`."""
        super().__init__()
        self.layers = nn.ModuleList([PairLayer(layer) for layer in layers])
        self._checkpointing = False

    def checkpoint_activations(self, on: bool = True) -> None:
        """Set whether backward recomputes each layer's activations instead of storing them."""
        self._checkpointing = on

    def forward(self, text_states: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """text_states (b, L, width), attention_mask (b, L), image_tokens (2b, P, image width), those of all left
        images first -> (b, L, width)."""
        mask = attention_mask[:, None, None, :].bool().expand(-1, 1, text_states.shape[1], -1)
        for layer in self.layers:
            if self._checkpointing and torch.is_grad_enabled():
                text_states = checkpoint(layer, text_states, mask, image_tokens, use_reentrant=False)
            else:
                text_states = layer(text_states, mask, image_tokens)
        return text_states


class PairLayer(nn.Module):
    """Layer of the fusion: two blocks with shared keys and values.

    Blocks hold no projections of their own for these, so that each parameter has one name in the state dict.
    """

    def __init__(self, layer: BertLayer) -> None:
        super().__init__()
        cross = layer.crossattention.self
        self.heads: int = cross.num_attention_heads
        self.key, self.value = copy.deepcopy(cross.key), copy.deepcopy(cross.value)
        self.left, self.right = PairBlock(layer), PairBlock(layer)

    def forward(self, text_states: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """mask (b, 1, L, L) bool; all else as in `PairFusionEncoder`."""
        keys, values = (split_heads(projection(image_tokens), self.heads) for projection in (self.key, self.value))
        b = len(text_states)
        seen = self.left(text_states, mask, keys[:b], values[:b])
        return self.right(seen, mask, keys[b:], values[b:])


class PairBlock(nn.Module):
    """BERT layer with cross-attention to keys and values that are given to it."""

    def __init__(self, layer: BertLayer) -> None:
        """Copy the layer."""
        super().__init__()
        cross = layer.crossattention
        self.heads, self.dropout = cross.self.num_attention_heads, cross.self.dropout.p
        self.attention = copy.deepcopy(layer.attention)
        self.query, self.cross_output = copy.deepcopy(cross.self.query), copy.deepcopy(cross.output)
        self.intermediate, self.output = copy.deepcopy(layer.intermediate), copy.deepcopy(layer.output)

    def forward(self, text_states: Tensor, mask: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """text_states (b, L, width), mask (b, 1, L, L) bool, keys and values (b, heads, P, head width) ->
        (b, L, width)."""
        attended, _ = self.attention(text_states, mask)
        query = split_heads(self.query(attended), self.heads)
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(query, keys, values, dropout_p=dropout)
        crossed = self.cross_output(seen.transpose(1, 2).flatten(2), attended)
        return self.output(self.intermediate(crossed), crossed)


class Nlvr2Objective(nn.Module):
    """Cross-entropy of each statement's truth."""

    def __init__(self, model: Nlvr2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: StatementBatch) -> dict[str, Tensor]:
        """Compute 0-dim float32 `loss`, the mean over the rank's statements, and `accuracy`, without gradient.

        With equally many statements a rank, the mean of either over ranks is that of the whole batch, and so are the
        gradients.
        """
        logits = self.model(batch.left, batch.right, batch.input_ids, batch.attention_mask)
        right = logits.detach().argmax(1) == batch.labels
        return {"loss": cross_entropy(logits, batch.labels), "accuracy": right.float().mean()}
