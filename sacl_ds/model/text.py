"""Text encoder and fusion encoder: BERT layers from transformers, the fusion half with cross-attention to the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertEncoder

from sacl_ds.model.bert import Looks, bert_layer
from sacl_ds.model.packing import Packing


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
    """A BertConfig with SDPA attention; image_width set: a fusion encoder whose cross-attention reads that width."""
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


class _Layers(nn.Module):
    """BERT layers run one after another."""

    def __init__(self) -> None:
        super().__init__()
        self._checkpointing = False
        self._layer: Callable[..., Tensor] = bert_layer

    def checkpoint_activations(self, on: bool = True) -> None:
        """Whether each layer is computed again in backward, instead of keeping what it made."""
        self._checkpointing = on

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile what runs a layer, once for all of them and for texts of any number and length."""
        self._layer = torch.compile(bert_layer, dynamic=True, backend=backend)

    def _run(
        self, encoder: BertEncoder, packed: Tensor, packing: Packing, mask: Tensor, looks: Looks | None = None
    ) -> Tensor:
        """(T, width) states behind the last layer. mask: (n, L), 1 where a token may be attended to."""
        attended = mask[:, None, None, :].bool()
        for each in encoder.layer:
            if self._checkpointing and torch.is_grad_enabled():
                packed = checkpoint(self._layer, each, packed, packing, attended, looks, use_reentrant=False)
            else:
                packed = self._layer(each, packed, packing, attended, looks)
        return packed


class TextEncoder(_Layers):
    """The lower BERT layers, on text alone; [CLS] is state 0."""

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
    """The upper BERT layers: text states attend to each other, in both directions, and to the image tokens."""

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
