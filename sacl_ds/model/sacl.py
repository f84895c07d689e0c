"""The model: image, text and fusion encoders with their heads (design of ALBEF; no loss, no state but parameters)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sacl_ds.config import ModelConfig
from sacl_ds.distributed import sum_over_ranks
from sacl_ds.errors import UserError
from sacl_ds.model.initialisation import initialise
from sacl_ds.model.text import FusionEncoder, MaskedLanguageHead, TextEncoder, bert_config
from sacl_ds.model.vision import ImageEncoder, ImageStates

MAX_LOGIT_SCALE = 100.0
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SaclModel(nn.Module):
    """Shapes: b pairs, P image tokens with [CLS] first, L text tokens with [CLS] first, d the shared space."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, pretrained: bool) -> None:
        """pretrained: whether timm's published weights are loaded where wanted; `starts.start` loads all others."""
        super().__init__()
        self.image_encoder = ImageEncoder(
            config.image_encoder,
            config.image_size,
            config.image_mean,
            config.image_std,
            pretrained=pretrained and config.timm_weights,
            arguments=config.image_encoder_arguments,
            selection=config.patch_selection,
        )
        image_width = self.image_encoder.width
        by_text = self.image_encoder.layers and config.patch_selection.guide == "text"
        if by_text and image_width != config.text_width:
            raise UserError(
                f"model.patch_selection: the text's [CLS] goes through the image encoder's own weights, so widths must "
                f"be equal: model.text_width={config.text_width}, {config.image_encoder} has {image_width}"
            )
        # its own caption chooses an image's patches before ITC has seen them
        self.captions_choose = bool(by_text) and config.patch_selection.placement == "published"

        def bert(layers: int, reads_image: bool):  # type: ignore[no-untyped-def]
            return bert_config(
                vocab_size=vocab_size,
                width=config.text_width,
                layers=layers,
                heads=config.text_heads,
                max_positions=config.max_positions or max(config.max_tokens, 512 if config.text_encoder else 0),
                dropout=config.dropout,
                image_width=image_width if reads_image else None,
                init_std=0.02 if config.init_gain is None else config.init_gain * config.text_width**-0.5,
            )

        self.text_encoder = TextEncoder(bert(config.text_layers, reads_image=False))
        fusion = bert(config.fusion_layers, reads_image=True)
        self.fusion_encoder = FusionEncoder(fusion, image_width)
        self.image_projection = Projection(image_width, config.embed_dim)
        self.text_projection = Projection(config.text_width, config.embed_dim)
        self.logit_scale = LogitScale(1 / config.init_temperature)
        self.matching_head = nn.Linear(config.text_width, 2)
        self.mlm_head = MaskedLanguageHead(fusion)
        if config.init_gain is not None and not (pretrained and config.timm_weights):
            initialise(self.image_encoder, config.init_gain)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Whether each block of the three encoders is computed again in backward, instead of keeping what it made: less
        memory for about a third more time."""
        for encoder in (self.image_encoder, self.text_encoder, self.fusion_encoder):
            encoder.checkpoint_activations(on)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Run each block of the three encoders compiled by torch.compile, from its first use on. In place: parameters
        and their names stay."""
        for encoder in (self.image_encoder, self.text_encoder, self.fusion_encoder):
            encoder.compile_layers(backend)

    def train_for(self, matching: bool, words: bool) -> None:
        """Leave the parts as they are that no loss reaches: the fusion encoder without ITM and MLM, and their heads.

        Else weight decay would shrink them, and they would take an optimizer's memory and time.
        """
        self.fusion_encoder.requires_grad_(matching or words)
        self.matching_head.requires_grad_(matching)
        self.mlm_head.requires_grad_(words)

    def encode_image(self, images: Tensor, guide: Tensor | None = None) -> tuple[ImageStates, Tensor]:
        """(b, 3, H, W) uint8 -> states and unit features (b, d) float32.

        guide: (b, width) [CLS] states of texts that choose the patches right away; without, no text takes part.
        """
        states = self.image_encoder(images, guide)
        return states, self.image_projection(states.tokens[:, 0])

    def image_tokens(self, states: ImageStates, guide: Tensor, images: Tensor | None = None) -> Tensor:
        """Tokens of images for n texts to be fused with: all of an image, or those that patch selection keeps.

        guide: (n, width) [CLS] states of the texts. images: (n,) places in the batch, None: text i with image i.
        Returns (n, P', width).
        """
        return self.image_encoder.guided(states, guide, images).tokens

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(b, L) int64 ids and mask -> states (b, L, width) and unit features (b, d) float32. places: of the tokens
        that are computed, as in `TextEncoder`."""
        states = self.text_encoder(input_ids, attention_mask, places)
        return states, self.text_projection(states[:, 0])

    def fuse(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        image_tokens: Tensor,
        *,
        repeats: int = 1,
        images: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Text states (n, L, width) that have seen image tokens -> (n, L, width), as `FusionEncoder` says; by default
        each text sees those of its own row."""
        return self.fusion_encoder(
            text_states, attention_mask, image_tokens, repeats=repeats, images=images, places=places
        )

    def match_logits(self, fused: Tensor) -> Tensor:
        """(b, L, width) fused states -> (b, 2) float32; index 1 means that text and image belong together."""
        return self.matching_head(fused[:, 0]).float()

    def token_logits(self, states: Tensor) -> Tensor:
        """(n, width) fused states of masked tokens -> (n, vocabulary)."""
        return self.mlm_head(states, self.text_encoder.bert.embeddings.word_embeddings.weight)


class Projection(nn.Linear):
    """(b, width) [CLS] states -> (b, embed_dim) unit vectors, float32 (float64 for float64 states). No bias."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__(width, embed_dim, bias=False)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        projected = super().forward(states)
        return nn.functional.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)


class LogitScale(nn.Module):
    """1 / temperature, learned as its logarithm in float32 and kept in [1, 100].

    A plain clamp has no gradient past its bound, so a parameter that crosses it never returns. This one passes a
    gradient that points back inside.
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        # shape (1,): DeepSpeed cannot flatten a 0-dim parameter
        self.log_scale = nn.Parameter(torch.tensor([math.log(initial)], dtype=torch.float32))

    def forward(self) -> Tensor:
        """0-dim, between 1 and 100."""
        return _ClampWithReturn.apply(self.log_scale, 0.0, math.log(MAX_LOGIT_SCALE)).exp().squeeze(0)


class _ClampWithReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.low, ctx.high = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (value,) = ctx.saved_tensors
        # the direction of all ranks together: each alone may disagree, and their mean must equal one process's
        total = sum_over_ranks(gradient)
        outwards = ((value >= ctx.high) & (total < 0)) | ((value <= ctx.low) & (total > 0))
        return gradient.masked_fill(outwards, 0.0), None, None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context for a pass that no engine runs (teacher, momentum model, evaluation): what `train.precision` means to
    the engine, products in half precision; parameters and sums stay float32."""
    return torch.autocast(device.type, _HALF.get(precision, torch.bfloat16), enabled=precision in _HALF)
