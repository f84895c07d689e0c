"""Text encoder and fusion encoder: BERT layers from transformers, the fusion half with cross-attention to the image.

transformers' modules own all parameters. Their forward pass is computed here, over packed texts, so that padding costs
nothing, and with keys and values of an image shared by all texts that look at it; the results are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertAttention, BertEncoder, BertLayer

from sacl_ds.data.batch import take


def bert_config(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    max_positions: int,
    dropout: float,
    init_std: float = 0.02,
    image_width: int | None = None,
) -> BertConfig:
    """Make a BertConfig with SDPA attention. image_width: width that a fusion encoder's cross-attention reads; None: no
    cross-attention."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=max_positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=init_std,
        is_decoder=image_width is not None,  # transformers' condition for cross-attention
        add_cross_attention=image_width is not None,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return config


class Packing(NamedTuple):
    """Packing of the real tokens of n texts, padded to `length`, one after another, so that only they are computed.

    places: (T,) int64, their ascending places among the n * length, none twice; None: all of them. T is the shape of a
    tensor and so known on the host: nothing here waits for the device.
    """

    rows: int
    length: int
    places: Tensor | None = None

    @classmethod
    def of(cls, texts: Tensor, places: Tensor | None) -> Packing:
        """Packing of texts of the shape (n, length), whose real tokens are at `places`."""
        rows, length = texts.shape
        everything = places is None or len(places) == rows * length
        return cls(rows, length, None if everything else places)

    def pack(self, states: Tensor) -> Tensor:
        """(n, length, ...) -> (T, ...), without a copy where all are computed."""
        flat = states.flatten(0, 1)
        return flat if self.places is None else _Pack.apply(flat, self.places)

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (n, length, ...), 0 at the places that are not computed."""
        if self.places is None:
            flat = packed
        else:
            room = packed.new_zeros(self.rows * self.length, *packed.shape[1:])
            flat = room.index_copy_(0, self.places, packed)
        return flat.unflatten(0, (self.rows, self.length))

    def positions(self, device: torch.device) -> Tensor:
        """(T,) int64: where in its text each computed token stands, from 0."""
        if self.places is None:
            return torch.arange(self.length, device=device).repeat(self.rows)
        return self.places % self.length


class _Pack(torch.autograd.Function):
    """Index selection of distinct rows, whose gradient is a copy: PyTorch's adds row by row, lest one is selected
    twice."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(flat)
        return flat.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        room = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return room.index_copy_(0, places, gradient), None


class Looks(NamedTuple):
    """Assignment of images to n = repeats * b + r texts.

    tokens: (b, P, image width). Text k * b + j, with k < repeats, looks at image j; the r texts after these at
    `images`, (r,) int64 places in the batch.
    """

    tokens: Tensor
    repeats: int = 1
    images: Tensor | None = None


def bert_layer(layer: BertLayer, states: Tensor, packing: Packing, mask: Tensor, looks: Looks | None = None) -> Tensor:
    """Run a layer on (T, width) packed states.

    mask: (n, 1, 1, L) bool, the tokens to attend to, all of them among those computed. looks: for a layer with
    cross-attention.
    """
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
    """Attend to the images, whose keys and values are projected once each.

    The texts that look at an image stand side by side, as one long sequence of queries, so that its keys and values
    need no copy; only for looks.images they are copied.
    """
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


class _Layers(nn.Module):
    """BERT layers run one after another."""

    def __init__(self) -> None:
        super().__init__()
        self._checkpointing = False
        self._layer: Callable[..., Tensor] = bert_layer

    def checkpoint_activations(self, on: bool = True) -> None:
        """Set whether backward recomputes each layer's activations instead of storing them."""
        self._checkpointing = on

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile the function that runs a layer, once for all of them and for texts of any number and length."""
        self._layer = torch.compile(bert_layer, dynamic=True, backend=backend)

    def _run(
        self, encoder: BertEncoder, packed: Tensor, packing: Packing, mask: Tensor, looks: Looks | None = None
    ) -> Tensor:
        """Run all layers on (T, width) states. mask: (n, L), 1 where a token may be attended to."""
        attended = mask[:, None, None, :].bool()
        for each in encoder.layer:
            if self._checkpointing and torch.is_grad_enabled():
                packed = checkpoint(self._layer, each, packed, packing, attended, looks, use_reentrant=False)
            else:
                packed = self._layer(each, packed, packing, attended, looks)
        return packed


class TextEncoder(_Layers):
    """Text encoder: the lower BERT layers, on text alone; [CLS] is state 0."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, places: Tensor | None = None) -> Tensor:
        """(b, L) int64 ids and mask -> (b, L, width) states.

        places: (T,) int64, the ascending places among the b * L of the tokens to be computed, to which all those belong
        that the mask names; states of all others are 0. None: all are computed, padding too.
        """
        packing = Packing.of(input_ids, places)
        ids, positions = packing.pack(input_ids), packing.positions(input_ids.device)
        packed = self.bert.embeddings(input_ids=ids[None], position_ids=positions[None])[0]
        return packing.unpack(self._run(self.bert.encoder, packed, packing, attention_mask))


class FusionEncoder(_Layers):
    """Fusion encoder: the upper BERT layers. Text states attend to each other, both ways, and to the image tokens."""

    def __init__(self, config: BertConfig, image_width: int) -> None:
        super().__init__()
        self.encoder = BertEncoder(config)
        for layer in self.encoder.layer:
            # is_decoder, needed for the cross-attention, also makes transformers' self-attention causal: undo that
            layer.attention.self.is_causal = False
            for projection in ("key", "value"):
                if image_width != config.hidden_size:
                    setattr(layer.crossattention.self, projection, nn.Linear(image_width, config.hidden_size))
        for module in self.modules():
            _initialise(module, config.initializer_range)

    def forward(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        image_tokens: Tensor,
        *,
        repeats: int = 1,
        images: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """text_states (n, L, width), attention_mask (n, L), image_tokens (b, P, image width) -> (n, L, width).

        n is repeats * b + r: row k * b + j, with k < repeats, looks at image j, and the last r rows at `images`, (r,)
        int64 places in the batch. Keys and values of an image are computed once. places: as in `TextEncoder`.
        """
        packing = Packing.of(attention_mask, places)
        looks = Looks(image_tokens, repeats, images)
        return packing.unpack(self._run(self.encoder, packing.pack(text_states), packing, attention_mask, looks))


def _initialise(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class MaskedLanguageHead(nn.Module):
    """BERT's prediction head; its output matrix is the word embedding, passed at each call (never copied)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        _initialise(self.dense, config.initializer_range)

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """states (n, width), word_embeddings (vocabulary, width) -> (n, vocabulary) logits."""
        hidden = self.norm(nn.functional.gelu(self.dense(states)))
        return nn.functional.linear(hidden, word_embeddings, self.bias)
