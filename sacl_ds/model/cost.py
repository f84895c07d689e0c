"""Cost of a model a pair, by its configuration alone: parameters, FLOPs, and what forward keeps for backward.

FLOPs are 2 for each multiply-add of matrix products, convolution and attention, as torch's FlopCounterMode counts them;
norms, activations, softmax and the batch's similarity matrix (2 N d a pair) are left out. What is kept is counted in
float32, with attention that stores no matrix of its own, without dropout and without activation checkpointing.
docs/lab/presets.md has the figures of the presets (`presets_page`).
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from sacl_ds.config import LossConfig, ModelConfig
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel

BACKWARD = 3  # forward and backward, of forward: a product has two gradients, each as dear as itself
PAIRINGS = 3  # of a pair in ITM: its own, a hard text, a hard image
_BYTES = 4  # of a float32
_SPECIAL = 2  # [CLS] and [SEP], which MLM never predicts


@dataclass(frozen=True)
class Cost:
    """Cost of a forward pass. flops: 2 a multiply-add. kept: numbers that backward needs, parameters aside."""

    flops: float = 0
    kept: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.kept + other.kept)

    def __rmul__(self, times: float) -> Cost:
        return Cost(times * self.flops, times * self.kept)

    @property
    def training_flops(self) -> float:
        """FLOPs of forward and backward."""
        return BACKWARD * self.flops

    @property
    def bytes(self) -> float:
        """Bytes kept for backward, in float32."""
        return _BYTES * self.kept


class ModelCost:
    """Costs of the model that a ModelConfig describes. Nothing of it is held in memory but shapes.

    text_tokens: length of every caption, [CLS] and [SEP] included; None: model.max_tokens. predicted: tokens of it that
    MLM predicts, on average; None: as loss.mlm_probability is by default. vocab_size: None: model.vocab_size, the most
    that a trained tokenizer may have. Raises UserError for an image encoder that is no plain vision transformer.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        text_tokens: int | None = None,
        predicted: float | None = None,
        vocab_size: int | None = None,
    ) -> None:
        with torch.device("meta"):
            self.model = SaclModel(config, vocab_size or config.vocab_size, pretrained=False)
        vit = self.model.image_encoder.vit
        plain = isinstance(vit, VisionTransformer) and type(vit.patch_embed) is PatchEmbed
        if not plain or any(type(block) is not Block or type(block.attn) is not Attention for block in vit.blocks):
            raise UserError(
                f"model.image_encoder={config.image_encoder!r}: costs are known for a VisionTransformer of timm with "
                f"plain Blocks, not for {type(vit).__name__}"
            )
        self.config = config
        self.patches: int = vit.patch_embed.num_patches
        self._set_texts(text_tokens or config.max_tokens, predicted)

    def _set_texts(self, tokens: int, predicted: float | None) -> None:
        self.text_tokens = tokens
        self.predicted = LossConfig().mlm_probability * (tokens - _SPECIAL) if predicted is None else predicted

    def with_texts(self, tokens: int, predicted: float | None = None) -> ModelCost:
        """Return the same model's costs with captions of another length; text_tokens and predicted as above."""
        other = copy(self)
        other._set_texts(tokens, predicted)
        return other

    def parameters(self) -> dict[str, int]:
        """Count parameters: image, text, fusion, heads (projections, temperature, ITM, MLM), and their sum."""
        model = self.model
        heads = [model.image_projection, model.text_projection, model.logit_scale, model.matching_head, model.mlm_head]
        parts = {
            "image": _parameters(model.image_encoder),
            "text": _parameters(model.text_encoder),
            "fusion": _parameters(model.fusion_encoder),
            "heads": sum(_parameters(head) for head in heads),
        }
        return {**parts, "all": sum(parts.values())}

    def pretraining(self, losses: Collection[str] = ("itc", "itm", "mlm")) -> Cost:
        """Cost of forward for ITC, and ITM (PAIRINGS a pair) and MLM if named; their texts are fused together."""
        length, matching, words = self.text_tokens, "itm" in losses, "mlm" in losses
        image, tokens = self.image(guided=self.model.captions_choose)
        cost = image + self.text() + self._projections()
        if matching:
            cost += PAIRINGS * self._matching()
        if words:
            cost += self.text() + self._word_logits()
        texts = PAIRINGS * matching + words
        if not texts:
            return cost
        if not self.chooses:
            return cost + self.fused_together(length, tokens, texts, elsewhere=int(matching))
        chosen, seen = self.chosen(tokens)
        return cost + texts * (chosen + self.fused(length, seen))

    def pairing(self) -> Cost:
        """Cost of fusing one text with one image, chosen from at once: VQA, half of NLVR2, without their head.

        Fine-tuning costs BACKWARD times as many FLOPs, inference just these.
        """
        image, tokens = self.image(guided=True)
        return self.text() + image + self.fused(self.text_tokens, tokens)

    def reranking(self, texts: int) -> Cost:
        """Cost of one image, its first-stage feature, and `texts` matched with it, which are encoded as well."""
        image, tokens = self.image(guided=False)
        chosen, seen = self.chosen(tokens)
        return image + self._projection(self.model.image_projection) + texts * (
            self.text() + self._projection(self.model.text_projection) + chosen
            + self.fused(self.text_tokens, seen) + self._matching()
        )  # fmt: skip

    def image(self, guided: bool) -> tuple[Cost, int]:
        """Cost of the image encoder, with or without a guide at hand; and the number of tokens that come out."""
        encoder, vit = self.model.image_encoder, self.model.image_encoder.vit
        tokens, width = 1 + self.patches, encoder.width
        proj = vit.patch_embed.proj
        pixels = proj.in_channels * self.config.image_size**2
        cost = Cost(2 * self.patches * proj.weight.numel(), pixels)
        if not isinstance(vit.norm_pre, nn.Identity):
            cost += Cost(0, tokens * (width + 2))
        last = Cost(0, tokens * (2 * width + 2))  # in and out of the last norm
        if not encoder.layers:
            return cost + sum((self._block(block, tokens) for block in vit.blocks), last), tokens
        first = encoder.layers[0]
        cost += sum((self._block(block, tokens) for block in vit.blocks[: first - 1]), Cost())
        cost += self._attention_half(vit.blocks[first - 1], tokens)
        settings = encoder.selection
        if settings.placement != "output" and (guided or settings.guide != "text"):
            chosen, seen = self._selected(held=False)
            return cost + chosen, seen
        cost += self._mlp_half(vit.blocks[first - 1], tokens)
        cost += sum((self._block(block, tokens) for block in vit.blocks[first:]), last)
        if settings.placement == "output" and guided:
            chosen, seen = self._selected(held=True)
            return cost + chosen, seen
        return cost, tokens

    @property
    def chooses(self) -> bool:
        """Whether a text still chooses among the tokens that `image` gave without a guide."""
        encoder = self.model.image_encoder
        settings = encoder.selection
        return bool(encoder.layers) and (
            settings.placement == "output" or (settings.placement == "tower" and settings.guide == "text")
        )

    def chosen(self, tokens: int) -> tuple[Cost, int]:
        """Cost of selecting an image's tokens for one text from those `image` gave; and the number that is left.

        The image has another index in the batch, so that its tokens are copied.
        """
        if not self.chooses:
            return Cost(0, tokens * self.model.image_encoder.width), tokens
        return self._selected(held=False)

    def text(self) -> Cost:
        """Cost of the text encoder."""
        bert, length = self.model.text_encoder.bert, self.text_tokens
        embedded = Cost(0, length * (bert.config.hidden_size + 2))
        return embedded + len(bert.encoder.layer) * self._bert_layer(bert.encoder.layer[0], length)

    def fused(self, length: int, tokens: int) -> Cost:
        """Cost of the fusion encoder for a text of that length with so many image tokens."""
        layers = self.model.fusion_encoder.encoder.layer
        return len(layers) * self._bert_layer(layers[0], length, tokens)

    def fused_together(self, length: int, tokens: int, texts: int, elsewhere: int) -> Cost:
        """Cost of the fusion encoder in pre-training, for `texts` an image that all see it whole.

        Keys and values are computed once, and copied for the texts that look elsewhere: at a hard image.
        """
        layers = self.model.fusion_encoder.encoder.layer
        width, own = self.config.text_width, texts - elsewhere
        inner = layers[0].crossattention.self
        spared = (texts - 1) * (_linear(inner.key, tokens) + _linear(inner.value, tokens))
        # queries of the texts that see their own image, laid side by side, and the results of all, put in order again
        copied = (own + texts) * length * width if own > 1 else 0
        return texts * self.fused(length, tokens) + len(layers) * Cost(-spared, copied - (own - 1) * 2 * tokens * width)

    def _selected(self, held: bool) -> tuple[Cost, int]:
        """Cost of `SelectingEncoder._selected`: from the scores at the first selecting layer on; and the tokens left.

        held: the tokens chosen from there are kept for backward anyway.
        """
        encoder, blocks = self.model.image_encoder, self.model.image_encoder.vit.blocks
        settings, width = encoder.selection, encoder.width
        patches, fused, cost = self.patches, False, Cost()

        for number in range(encoder.layers[0], len(blocks) + 1):
            block = blocks[number - 1]
            if number not in encoder.layers:
                cost += self._block(block, 1 + patches + fused)
                continue
            if number != encoder.layers[0]:
                cost += self._attention_half(block, 1 + patches + fused)
            candidates = patches + fused
            by_keys = settings.guide == "cls" or settings.score == "keys"
            if settings.guide == "text":
                cost += Cost(2 * block.attn.qkv.weight.numel(), 4 * width)
            if settings.guide != "random":  # a copy of the keys, and what each head gives them
                heads = block.attn.num_heads
                cost += Cost(2 * candidates * width, candidates * (width + heads) if by_keys else candidates)
            keep = settings.kept_count(patches)
            if keep < patches:
                # the tokens chosen from, the fused one's weights before and after they are scaled, places (int64)
                first_held = held and number == encoder.layers[0]
                kept = (0 if first_held else (1 + candidates) * width) + 2 * candidates + 2 * keep
                cost += Cost(2 * candidates * width, kept)
                patches, fused = keep, True
            if settings.placement != "output":
                cost += self._mlp_half(block, 1 + patches + fused)
        tokens = 1 + patches + fused
        if settings.placement != "output":
            return cost + Cost(0, tokens * (2 * width + 2)), tokens
        return cost + Cost(0, tokens * width if fused or not held else 0), tokens

    def _block(self, block: Block, tokens: int) -> Cost:
        return self._attention_half(block, tokens) + self._mlp_half(block, tokens)

    def _attention_half(self, block: Block, tokens: int) -> Cost:
        width, attention = self.model.image_encoder.width, block.attn
        # kept: input of the norm and its two statistics, the norm's output, queries, keys, values, what attention
        # gives, and a number a row of it
        kept = tokens * (width + 2 + width + 3 * width + width + attention.num_heads)
        return Cost(_linear(attention, tokens) + 4 * tokens**2 * width, kept)

    def _mlp_half(self, block: Block, tokens: int) -> Cost:
        width, hidden = self.model.image_encoder.width, block.mlp.fc1.out_features
        return Cost(_linear(block.mlp, tokens), tokens * (width + 2 + width + 2 * hidden))

    def _bert_layer(self, layer: Any, length: int, tokens: int | None = None) -> Cost:
        """Cost of a BERT layer. tokens: of the image, where the layer has cross-attention."""
        width, heads = self.config.text_width, self.config.text_heads
        hidden = layer.intermediate.dense.out_features
        # attention: its input, queries, keys, values, result, a number a row, and the norm's input and statistics
        cost = Cost(_linear(layer.attention, length) + 4 * length**2 * width, length * (6 * width + heads + 2))
        if tokens is not None:
            inner = layer.crossattention.self
            cost += Cost(
                _linear(inner.query, length) + _linear(inner.key, tokens) + _linear(inner.value, tokens)
                + _linear(layer.crossattention.output, length) + 4 * length * tokens * width,
                length * (4 * width + heads + 2) + 2 * tokens * width,
            )  # fmt: skip
        feed = _linear(layer.intermediate, length) + _linear(layer.output, length)
        return cost + Cost(feed, length * (width + 2 * hidden + width + 2))

    def _projections(self) -> Cost:
        return self._projection(self.model.image_projection) + self._projection(self.model.text_projection)

    def _projection(self, projection: nn.Linear) -> Cost:
        return Cost(_linear(projection, 1), 2 * projection.out_features)

    def _matching(self) -> Cost:
        return Cost(_linear(self.model.matching_head, 1), self.config.text_width)

    def _word_logits(self) -> Cost:
        width, vocabulary = self.config.text_width, len(self.model.mlm_head.bias)
        flops = 2 * self.predicted * width * (width + vocabulary)
        return Cost(flops, self.predicted * (4 * width + 2 + vocabulary))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linear(module: nn.Module, tokens: int) -> int:
    """Count the FLOPs of all linear layers of a module, each run on `tokens` tokens."""
    return sum(2 * tokens * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
