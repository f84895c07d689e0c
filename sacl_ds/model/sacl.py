"""SACL model: image, text and fusion encoders with their heads, and the pass of a pre-training batch through them.

The design is ALBEF's. No loss, no state but parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sacl_ds.config import ModelConfig
from sacl_ds.data.batch import Batch, places_of, take
from sacl_ds.data.text import IGNORED
from sacl_ds.distributed import sum_over_ranks
from sacl_ds.errors import UserError
from sacl_ds.model.text import FusionEncoder, MaskedLanguageHead, Packing, TextEncoder, bert_config
from sacl_ds.model.vision import ImageEncoder, ImageStates


def initialise(module: nn.Module, gain: float) -> None:
    """Draw linear weights from a normal with deviation gain / sqrt(inputs); biases are 0, all else is untouched.

    The 0.02 of BERT and timm is meant for width 768. At width 128 it makes the towers nearly linear, and a model whose
    features are sums over words and patches learns which colours and shapes there are, but for a long time not which
    goes with which (docs/lab/log.md).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=gain * part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


MAX_LOGIT_SCALE = 100.0
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SaclModel(nn.Module):
    """Model of image-text pairs. b: pairs, P: image tokens, L: text tokens, both with [CLS] first, d: shared space."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, pretrained: bool) -> None:
        """Build the model. pretrained: load timm's published weights where wanted; `starts.start` loads all others."""
        super().__init__()
        self.image_encoder = _image_encoder(config, pretrained and config.timm_weights)
        image_width = self.image_encoder.width
        by_text = self.image_encoder.layers and config.patch_selection.guide == "text"
        if by_text and image_width != config.text_width:
            raise UserError(
                f"model.patch_selection: the text's [CLS] goes through the image encoder's own weights, so widths must "
                f"be equal: model.text_width={config.text_width}, {config.image_encoder} has {image_width}"
            )
        # its own caption chooses an image's patches before ITC has seen them
        self.captions_choose = bool(by_text) and config.patch_selection.placement == "published"

        def bert_settings(layers: int, reads_image: bool):  # type: ignore[no-untyped-def]
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

        self.text_encoder = TextEncoder(bert_settings(config.text_layers, reads_image=False))
        fusion = bert_settings(config.fusion_layers, reads_image=True)
        self.fusion_encoder = FusionEncoder(fusion, image_width)
        self.image_projection = Projection(image_width, config.embed_dim)
        self.text_projection = Projection(config.text_width, config.embed_dim)
        self.logit_scale = LogitScale(1 / config.init_temperature)
        self.matching_head = nn.Linear(config.text_width, 2)
        self.mlm_head = MaskedLanguageHead(fusion)
        if config.init_gain is not None and not (pretrained and config.timm_weights):
            initialise(self.image_encoder, config.init_gain)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Set whether backward recomputes the blocks' activations: less memory for about a third more time."""
        for encoder in (self.image_encoder, self.text_encoder, self.fusion_encoder):
            encoder.checkpoint_activations(on)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Run each block of the three encoders compiled by torch.compile, from its first use on. In place: parameters
        and their names stay."""
        for encoder in (self.image_encoder, self.text_encoder, self.fusion_encoder):
            encoder.compile_layers(backend)

    def train_for(self, matching: bool, words: bool) -> None:
        """Freeze the parts that no loss reaches: the fusion encoder without ITM and MLM, and their heads.

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
        """Return the image tokens that n texts are fused with: all of an image, or those that patch selection keeps.

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
        """Fuse text states (n, L, width) with image tokens -> (n, L, width), as `FusionEncoder` says.

        By default each text sees the tokens of its own row.
        """
        return self.fusion_encoder(
            text_states, attention_mask, image_tokens, repeats=repeats, images=images, places=places
        )

    def match_logits(self, fused: Tensor) -> Tensor:
        """(b, L, width) fused states -> (b, 2) float32; index 1 means that text and image belong together."""
        return self.matching_head(fused[:, 0]).float()

    def token_logits(self, states: Tensor) -> Tensor:
        """(n, width) fused states of masked tokens -> (n, vocabulary)."""
        return self.mlm_head(states, self.text_encoder.bert.embeddings.word_embeddings.weight)


def _image_encoder(config: ModelConfig, pretrained: bool) -> ImageEncoder:
    name, size, mean, std = config.image_encoder, config.image_size, config.image_mean, config.image_std
    if config.patch_selection.placement == "none":
        return ImageEncoder(name, size, mean, std, pretrained, config.image_encoder_arguments)
    from sacl_ds.model.patch_selection import SelectingEncoder

    further, selection = config.image_encoder_arguments, config.patch_selection
    return SelectingEncoder(name, size, mean, std, pretrained, further, selection=selection)


class Projection(nn.Linear):
    """(b, width) [CLS] states -> (b, embed_dim) unit vectors, float32 (float64 for float64 states). No bias."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__(width, embed_dim, bias=False)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        projected = super().forward(states)
        return nn.functional.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)


class LogitScale(nn.Module):
    """Logit scale, 1 / temperature, learned as its logarithm in float32 and kept in [1, 100].

    A plain clamp has no gradient past its bound, so a parameter that crosses it never returns. This one passes a
    gradient that points back inside.
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        # shape (1,): DeepSpeed cannot flatten a 0-dim parameter
        self.log_scale = nn.Parameter(torch.tensor([math.log(initial)], dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return the 0-dim scale, between 1 and 100."""
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
    """Return the context for a pass that no engine runs (teacher, momentum model, evaluation).

    It does what `train.precision` means to the engine: products in half precision; parameters and sums stay float32.
    """
    return torch.autocast(device.type, _HALF.get(precision, torch.bfloat16), enabled=precision in _HALF)


def encoded_texts(model: SaclModel, batch: Batch, masked: bool) -> Tensor:
    """Encode the captions, (b, L, width), followed, if `masked`, by the masked captions: (2b, L, width).

    Padding is not computed where the batch says which tokens are real.
    """
    ids, mask, places = batch.input_ids, batch.attention_mask, batch.token_places
    if masked:
        assert batch.masked_ids is not None
        ids, mask = torch.cat([ids, batch.masked_ids]), mask.repeat(2, 1)
        places = _stacked([places, places], batch.input_ids)
    return model.text_encoder(ids, mask, places)


def masked_texts(model: SaclModel, batch: Batch) -> Tensor:
    """Encode the masked captions, (b, L, width)."""
    assert batch.masked_ids is not None
    return model.text_encoder(batch.masked_ids, batch.attention_mask, batch.token_places)


def fused_texts(
    model: SaclModel, image_states: ImageStates, text_states: Tensor, hard: tuple[Tensor, Tensor] | None, batch: Batch
) -> Tensor:
    """Run one pass of the fusion encoder for ITM and MLM, so that an image's keys and values are computed once.

    text_states: as from `encoded_texts`. hard: (b,) int64 places in the batch, of each image's hard text and of each
    text's hard image. Returns (n, L, width), one after another: captions and each image's hard text, masked captions if
    there are any, and captions with their hard image; the last b texts alone where hard is None. Where texts choose
    patches, each chooses its own: a masked caption by itself, since the whole one would give away what is masked.
    """
    b, mask, real = len(batch), batch.attention_mask, batch.token_places
    captions, masked = text_states[:b], [text_states[b:]] if len(text_states) > b else []
    if hard is None:
        states, repeats, places = text_states[-b:], 1, real
    else:
        states, repeats = torch.cat([captions, take(captions, hard[0]), *masked, captions]), 2 + len(masked)
        mask = torch.cat([mask, mask[hard[0]], *[mask] * len(masked), mask])
        # which texts are hard is known on the device alone, and so are their lengths
        whole = None if real is None else torch.arange(mask.shape[1] * b, device=real.device)
        places = _stacked([real, whole, *[real] * len(masked), real], batch.input_ids)
    hard_images = None if hard is None else hard[1]
    if image_states.scored is None:
        return model.fuse(states, mask, image_states.tokens, repeats=repeats, images=hard_images, places=places)
    looked_at = None
    if hard_images is not None:
        looked_at = torch.cat([torch.arange(b, device=hard_images.device).repeat(repeats), hard_images])
    image_tokens = model.image_tokens(image_states, states[:, 0], looked_at)
    return model.fuse(states, mask, image_tokens, places=places)


def predictions(model: SaclModel, fused: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits (n, vocabulary) and labels (n,) of the masked tokens, given fused masked captions (b, L, width)."""
    assert batch.mlm_labels is not None
    places = batch.mlm_places
    if places is None:
        places = places_of(batch.mlm_labels != IGNORED)
    masked = Packing.of(batch.mlm_labels, places)
    return model.token_logits(masked.pack(fused)), masked.pack(batch.mlm_labels)


def predicted_tokens(model: SaclModel, image_states: ImageStates, batch: Batch) -> Tensor:
    """Predict the batch's masked tokens, (n, vocabulary) logits, from the masked captions and the images."""
    fused = fused_texts(model, image_states, masked_texts(model, batch), None, batch)
    return predictions(model, fused, batch)[0]


def _stacked(parts: list[Tensor | None], ids: Tensor) -> Tensor | None:
    """Return the indices of real tokens in concatenated batches of texts like `ids`, (b, L)."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return torch.cat([part + number * ids.numel() for number, part in enumerate(known)])
