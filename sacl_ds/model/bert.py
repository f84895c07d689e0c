"""The forward pass of BERT's layers over packed texts, with keys and values of an image shared by its texts.

transformers' modules own all parameters; what is computed here is what theirs compute.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.bert.modeling_bert import BertAttention, BertLayer

from sacl_ds.model.indexing import take
from sacl_ds.model.packing import Packing


class Looks(NamedTuple):
    """Which image each of n = repeats * b + r texts looks at.

    tokens: (b, P, image width). Text k * b + j, with k < repeats, looks at image j; the r texts behind these at
    `images`, (r,) int64 places in the batch.
    """

    tokens: Tensor
    repeats: int = 1
    images: Tensor | None = None


def bert_layer(layer: BertLayer, states: Tensor, packing: Packing, mask: Tensor, looks: Looks | None = None) -> Tensor:
    """(T, width) packed states -> the same behind the layer. mask: (n, 1, 1, L) bool, the tokens to attend to, all of
    them among those computed. looks: for a layer with cross-attention."""
    states = _self_attention(layer.attention, states, packing, mask)
    if layer.is_decoder:  # transformers' own condition for cross-attention
        assert looks is not None
        states = _cross_attention(layer.crossattention, states, packing, looks)
    return layer.output(layer.intermediate(states), states)


def _self_attention(attention: BertAttention, states: Tensor, packing: Packing, mask: Tensor) -> Tensor:
    inner = attention.self
    heads, dropout = inner.num_attention_heads, inner.dropout.p if inner.training else 0.0
    query, key, value = (
        split_heads(packing.unpack(projection(states)), heads) for projection in (inner.query, inner.key, inner.value)
    )
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return attention.output(packing.pack(_joined(mixed)), states)


def _cross_attention(attention: BertAttention, states: Tensor, packing: Packing, looks: Looks) -> Tensor:
    """Keys and values are projected once an image. The texts that look at an image stand side by side, as one long
    sequence of queries, so that its keys and values need no copy; only for looks.images they are copied."""
    inner, (tokens, repeats, images) = attention.self, looks
    heads, dropout = inner.num_attention_heads, inner.dropout.p if inner.training else 0.0
    b, length = len(tokens), packing.length
    key, value = inner.key(tokens), inner.value(tokens)
    query = packing.unpack(inner.query(states))
    beside = query[: repeats * b].unflatten(0, (repeats, b)).transpose(0, 1).flatten(1, 2)
    mixed = _joined(_attend(beside, key, value, heads, dropout))
    mixed = mixed.unflatten(1, (repeats, length)).transpose(0, 1).flatten(0, 1)
    if images is not None:
        others = _attend(query[repeats * b :], take(key, images), take(value, images), heads, dropout)
        mixed = torch.cat([mixed, _joined(others)])
    return attention.output(packing.pack(mixed), states)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, dropout: float) -> Tensor:
    """query (n, m, width), key and value (n, P, width) -> (n, heads, m, head width)."""
    split_query, split_key, split_value = (split_heads(x, heads) for x in (query, key, value))
    return functional.scaled_dot_product_attention(split_query, split_key, split_value, dropout_p=dropout)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(n, m, width) -> (n, heads, m, head width)."""
    return states.unflatten(2, (heads, -1)).transpose(1, 2)


def _joined(mixed: Tensor) -> Tensor:
    """(n, heads, m, head width) -> (n, m, width)."""
    return mixed.transpose(1, 2).flatten(2)
