"""The model, with presets."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sacl_ds.config.room import Fraction, PathText, Positive, PositiveFloat, Room

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_encoder": "vit_tiny_patch16_224",
        "image_encoder_arguments": {"embed_dim": 128, "depth": 3, "num_heads": 4, "patch_size": 16},
        "image_pretrained": False,
        "image_size": 48,
        "text_encoder": None,
        "text_width": 128,
        "text_heads": 4,
        "text_layers": 2,
        "fusion_layers": 1,
        "embed_dim": 128,
        "dropout": 0.0,
        "init_gain": 1.4,
        "vocab_size": 4000,
        "max_tokens": 32,
    },
    "base": {
        "image_encoder": "vit_base_patch16_clip_quickgelu_224.openai",
        "image_encoder_arguments": {},
        "image_pretrained": True,
        "image_size": 256,
        "text_encoder": "google-bert/bert-base-uncased",
        "text_width": 768,
        "text_heads": 12,
        "text_layers": 6,
        "fusion_layers": 6,
        "embed_dim": 256,
        "dropout": 0.1,
        "init_gain": None,
        "vocab_size": 30522,
        "max_tokens": 30,
    },
}


_FILES_OF_TIMM = ("checkpoint_path", "cache_dir")


def _is_plain(value: Any) -> bool:
    """Return whether JSON restores the value exactly."""
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return all(map(_is_plain, inner)) and (isinstance(value, list) or all(type(key) is str for key in value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or type(value) in (bool, str) or (type(value) is int and abs(value) < 2**63)


class PatchSelectionConfig(Room):
    """Fewer image tokens, chosen by what the text asks for (`sacl_ds.model.patch_selection`, docs/lab/patches.md)."""

    placement: Literal["none", "tower", "output", "published"] = Field(
        "none",
        description="where patches are left out: inside the image encoder for every text (tower: VQA, NLVR2), after it "
        "(output: pre-training, re-ranking), inside by the own caption (published: leaks it to ITC)",
    )
    layers: list[Positive] = Field([5, 10], description="layers, from 1, after whose attention the tower selects")
    keep_rate: Fraction = Field(0.7, description="share of the patches that each selection keeps; output selects once")
    guide: Literal["text", "cls", "random"] = Field(
        "text", description="who chooses: the text's [CLS], the image's, or chance"
    )
    score: Literal["keys", "tokens"] = Field(
        "keys", description="what the text's query is compared with: keys of the attention, or tokens (published)"
    )

    @model_validator(mode="after")
    def _check(self) -> PatchSelectionConfig:
        if self.placement != "none" and not self.layers:
            raise ValueError("model.patch_selection.layers is empty; name at least one layer, or placement=none")
        if self.keep_rate == 0:
            raise ValueError("model.patch_selection.keep_rate=0.0 keeps no patch; give a share above 0")
        return self

    def kept_count(self, patches: int) -> int:
        """How many of so many patches one selection keeps: the share, rounded up."""
        return min(patches, math.ceil(round(self.keep_rate * patches, 6)))


class ModelConfig(Room):
    """Fields left out come from the preset."""

    preset: Literal["tiny", "base"] = Field("tiny", description="tiny: CPU minutes, from scratch; base: the paper's")
    image_encoder: PathText = Field(description="timm name, or 'local-dir:/path' of a timm model folder")
    image_encoder_arguments: dict[str, Any] = Field(description="arguments of timm.create_model: depth, embed_dim, ...")
    image_pretrained: bool = Field(description="start from timm's published weights of image_encoder")
    image_weights: PathText | None = Field(
        None,
        description="start image_encoder from a CLIP of transformers (folder or hub name), or a file in the layout of "
        "OpenAI's CLIP, open_clip, transformers or timm",
    )
    image_size: Positive = Field(description="pixels a side")
    image_mean: tuple[float, float, float] = Field(_CLIP_MEAN, description="pixel normalisation, of values in [0, 1]")
    image_std: tuple[float, float, float] = Field(_CLIP_STD, description="pixel normalisation, of values in [0, 1]")
    text_encoder: PathText | None = Field(
        description="hub name or folder of a BERT to start from and take the tokenizer of"
    )
    start: PathText | None = Field(
        None,
        description="start the whole model from a file of ALBEF's (text_encoder gives the tokenizer) or a finished run",
    )
    text_width: Positive = Field(description="width of the text and fusion encoders")
    text_heads: Positive = Field(description="attention heads of the text and fusion encoders")
    text_layers: Positive = Field(description="lower BERT layers, on text alone")
    fusion_layers: Positive = Field(description="upper BERT layers, with cross-attention to the image")
    embed_dim: Positive = Field(description="width of the shared image-text space")
    dropout: Fraction = Field(description="in the text and fusion encoders")
    vocab_size: Positive = Field(description="largest WordPiece vocabulary trained where text_encoder is none")
    max_tokens: Positive = Field(description="captions are cut to so many tokens, [CLS] and [SEP] included")
    max_positions: Positive | None = Field(
        None, description="longest text that the text encoder could read; null: as start or text_encoder, or max_tokens"
    )
    init_gain: PositiveFloat | None = Field(
        description="weights that start from scratch: deviation init_gain / sqrt(width); null: the libraries' 0.02"
    )
    patch_selection: PatchSelectionConfig = PatchSelectionConfig()
    init_temperature: PositiveFloat = Field(0.07, description="temperature at the start; learned from there")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "tiny")
        return {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}

    @field_validator("image_encoder_arguments")
    @classmethod
    def _of_the_architecture(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Refuse arguments by which timm would read or write files: weights have settings of their own."""
        for name, value in values.items():
            if name.startswith("pretrained") or name in _FILES_OF_TIMM:
                raise ValueError(
                    f"model.image_encoder_arguments.{name}: it names files, not an architecture; give weights by "
                    "model.image_weights or model.image_pretrained"
                )
            if not _is_plain(value):
                raise ValueError(f"model.image_encoder_arguments.{name}: numbers, texts, lists and mappings of them")
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.text_width % self.text_heads:
            raise ValueError(
                f"model.text_width={self.text_width} must be a multiple of model.text_heads={self.text_heads}"
            )
        if not 0.01 <= self.init_temperature <= 1:
            raise ValueError(
                f"model.init_temperature={self.init_temperature} must lie in [0.01, 1] (logit scale 1 to 100)"
            )
        if self.start and self.image_weights:
            raise ValueError("model.start brings the image encoder's weights; leave out one of the two")
        if self.max_positions is not None and self.max_positions < self.max_tokens:
            raise ValueError(
                f"model.max_positions={self.max_positions} is less than model.max_tokens={self.max_tokens}; "
                "give it as much, or leave it out"
            )
        return self

    @property
    def starts_from_weights(self) -> bool:
        """Whether any part of the model starts from published weights or from a run."""
        return bool(self.start or self.image_weights or self.text_encoder or self.timm_weights)

    @property
    def timm_weights(self) -> bool:
        """Whether timm's published weights are loaded: where no setting names others."""
        return self.image_pretrained and not self.image_weights and not self.start
