"""Text encoder and fusion encoder: BERT layers from transformers, the fusion half with cross-attention to the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertEncoder


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


class TextEncoder(nn.Module):
    """The lower BERT layers, on text alone. (b, L) int64 ids and mask -> (b, L, width) states; [CLS] is state 0."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class FusionEncoder(nn.Module):
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

    def forward(self, text_states: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """text_states (b, L, width), attention_mask (b, L), image_tokens (b, P, image width) -> (b, L, width)."""
        mask = attention_mask[:, None, None, :].bool().expand(-1, 1, text_states.shape[1], -1)
        output = self.encoder(text_states, attention_mask=mask, encoder_hidden_states=image_tokens)
        return output.last_hidden_state


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
