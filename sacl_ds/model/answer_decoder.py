"""Answer decoder: causal BERT layers with cross-attention to the fused question, which predict token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
from transformers import BertModel

from sacl_ds.config import ModelConfig
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.text import bert_config


class WordTable(nn.Embedding):
    """Word embeddings that also serve as the output matrix, with its bias.

    Both uses go through this module: under ZeRO 3 it gathers its own weights for each, in an engine's pass and out of
    it. What transformers has in its place is read through the attribute `weight`, which ZeRO 3 fills in the first only.
    """

    def __init__(self, words: int, width: int, padding_idx: int | None) -> None:
        super().__init__(words, width, padding_idx)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, input: Tensor) -> Tensor:
        """int64 ids (...) -> (..., width); states (..., width) -> (..., words) logits."""
        return linear(input, self.weight, self.bias) if input.is_floating_point() else super().forward(input)


class AnswerDecoder(nn.Module):
    """Text decoder with the fusion encoder's depth and initial weights, and word embeddings of its own."""

    def __init__(self, start: SaclModel, config: ModelConfig) -> None:
        """Copy start's fusion encoder, text embeddings and MLM head.

        Keys and values of the cross-attention are drawn anew where images are of another width than text.
        """
        super().__init__()
        words = start.text_encoder.bert.embeddings
        width = config.text_width
        bert = bert_config(
            vocab_size=words.word_embeddings.num_embeddings,
            width=width,
            layers=config.fusion_layers,
            heads=config.text_heads,
            max_positions=words.position_embeddings.num_embeddings,
            dropout=config.dropout,
            image_width=width,  # of what its cross-attention reads
            init_std=start.fusion_encoder.encoder.config.initializer_range,
        )
        self.bert = BertModel(bert, add_pooling_layer=False)
        self.bert.embeddings.word_embeddings = WordTable(bert.vocab_size, width, padding_idx=bert.pad_token_id)
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=bert.layer_norm_eps)
        head = start.mlm_head
        self.bert.embeddings.load_state_dict(words.state_dict() | {"word_embeddings.bias": head.bias.detach()})
        self.dense.load_state_dict(head.dense.state_dict())
        self.norm.load_state_dict(head.norm.state_dict())
        pretrained = start.fusion_encoder.encoder.state_dict()
        fresh = self.bert.encoder.state_dict()
        # of another shape: keys and values of images that are wider or narrower than text
        fitting = {name: value for name, value in pretrained.items() if value.shape == fresh[name].shape}
        self.bert.encoder.load_state_dict(fresh | fitting)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Set whether backward recomputes each layer's activations instead of storing them."""
        if on:
            self.bert.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.bert.gradient_checkpointing_disable()

    def forward(self, answer_ids: Tensor, question_states: Tensor, question_mask: Tensor) -> Tensor:
        """(A, La) int64, (A, L, width), (A, L) int64 or bool -> (A, La, width); state i has seen ids 0 .. i only, so
        padding at the end changes nothing before it."""
        length, asked = answer_ids.shape[1], question_states.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=answer_ids.device).tril()
        output = self.bert(
            input_ids=answer_ids,
            attention_mask=causal.expand(len(answer_ids), 1, -1, -1),
            encoder_hidden_states=question_states,
            encoder_attention_mask=question_mask[:, None, None, :].bool().expand(-1, 1, length, asked),
        )
        return output.last_hidden_state

    def token_logits(self, states: Tensor) -> Tensor:
        """Compute the next token's logits: (n, width) states -> (n, vocabulary) float32."""
        logits = self.bert.embeddings.word_embeddings(self.norm(gelu(self.dense(states))))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
