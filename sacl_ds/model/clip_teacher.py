"""Teacher from elsewhere: a CLIPModel or ChineseCLIPModel of transformers, with its own preprocessing and tokens."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, ChineseCLIPModel, CLIPModel

from sacl_ds.data.batch import View
from sacl_ds.data.pictures import Picture
from sacl_ds.errors import CannotLoad, UserError
from sacl_ds.model.placing import require_finite, require_none_lacking
from sacl_ds.model.saved import identity_of
from sacl_ds.model.starts.pretrained import load_pretrained, load_settings

_MODELS = {"clip": CLIPModel, "chinese_clip": ChineseCLIPModel}
_PROCESSOR = "image processor"
_LARGEST = 2  # as eos_token_id, of models older than that setting: the end token is the one of the largest id
_OF_THE_FILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True)
class ClipPixels:
    """Transform that resizes and crops as the processor does, in uint8; `ClipTeacher` rescales and normalises on the
    device."""

    processor: Any  # an image processor of transformers
    size: int

    def __call__(self, picture: Picture, entropy: tuple[int, ...]) -> Tensor:
        """Transform a picture to (3, size, size) uint8; `entropy` is not used. Raises BadImage."""
        made = self.processor(picture.pixels(), do_rescale=False, do_normalize=False, return_tensors="pt")
        return made["pixel_values"][0].to(torch.uint8)


@dataclass(frozen=True)
class ClipTokens:
    """Tokenizer of the model, cut to the positions that it has, or to the length that the tokenizer names."""

    fast: Any
    max_tokens: int

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        return self.fast(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]

    @property
    def pad_id(self) -> int:
        return int(self.fast.pad_token_id)

    @cached_property
    def fingerprint(self) -> str:
        vocabulary = sorted(self.fast.get_vocab().items())
        return hashlib.sha256(f"clip {self.max_tokens} {vocabulary}".encode()).hexdigest()


class ClipTeacher:
    """Frozen CLIPModel or ChineseCLIPModel, an export of ours among them, as a `Teacher`."""

    def __init__(self, name_or_folder: str, device: torch.device, setting: str) -> None:
        """Load a folder written by save_pretrained of model and processor, or a hub name. Raises UserError."""
        label = f"{setting}={name_or_folder}"
        kind = load_settings(name_or_folder, setting).model_type
        if kind not in _MODELS:
            raise UserError(
                f"{label} holds a model of type {kind!r}; give a CLIPModel or ChineseCLIPModel, or the directory of a "
                "finished run"
            )
        model, lacking, unknown = load_pretrained(_MODELS[kind], name_or_folder, setting)
        try:
            processor = AutoImageProcessor.from_pretrained(name_or_folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
        except Exception as error:  # as in `Tokenizer.load`
            raise CannotLoad(setting, name_or_folder, error) from None
        require_none_lacking(lacking, label, unknown)
        require_finite(model.state_dict(), label)
        self.model = model.requires_grad_(False).eval().to(device)
        self._processor = processor
        longest = min(model.config.text_config.max_position_embeddings, tokenizer.model_max_length)
        pixels = ClipPixels(processor, model.config.vision_config.image_size)
        tokens = ClipTokens(tokenizer, longest)
        self.view = View(pixels, tokens)
        _require_pictures(pixels, label)
        _require_texts(tokens, model.config.text_config, kind == "clip", label)
        self.rescale, *normed = _arithmetic(processor, label)
        self.mean, self.std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in normed)

    @property
    def identity(self) -> str:
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in _OF_THE_FILE}
        settings = json.dumps([config, self._processor.to_dict()], sort_keys=True, default=str)
        return identity_of(self.model, settings, self.view.tokenizer.fingerprint)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Encode (b, 3, H_t, W_t) uint8 -> (b, d_t) unit float32."""
        pixels = (images.float() * self.rescale - self.mean) / self.std
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode ids and mask, (b, L_t) int64 -> (b, d_t) unit float32."""
        return _unit(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


def _require_pictures(view: ClipPixels, label: str) -> None:
    """Raises UserError where the processor does not make the model's pictures, of upright and of lying ones."""
    try:
        made = [view(Picture(torch.zeros(3, *shape, dtype=torch.uint8)), ()) for shape in ((40, 60), (60, 40))]
    except Exception as error:  # settings that the library cannot compute with make it raise anything
        raise UserError(f"{label}: its {_PROCESSOR} cannot be used: {error}; put it right") from None
    wrong = next((each.shape for each in made if each.shape != (3, view.size, view.size)), None)
    if wrong:
        raise UserError(
            f"{label}: its {_PROCESSOR} makes pictures of {' × '.join(map(str, wrong[1:]))}, and the model takes "
            f"{view.size} × {view.size}; put its size and crop_size right"
        )


def _arithmetic(processor: Any, label: str) -> tuple[float, list[float], list[float]]:
    """Return the factor of the pixels, and mean and deviation of each channel. Raises UserError where they are not to
    be computed with."""
    try:
        scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        named = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        mean, std = ([float(value) for value in values] for values in named)
    except (TypeError, ValueError):
        mean = std = []
    if not len(mean) == len(std) == 3 or not all(map(math.isfinite, [scale, *mean, *std])) or min(scale, *std) <= 0:
        raise UserError(f"{label}: its {_PROCESSOR} has no rescale_factor, image_mean and image_std to compute with")
    return scale, mean, std


def _require_texts(tokens: ClipTokens, config: Any, pooled_at_end: bool, label: str) -> None:
    """Raises UserError where the tokenizer is not the model's: it has more words, or none that the model looks for.

    pooled_at_end: whether the features are those of the end token, by its id, or by the largest one where that is 2.
    """
    ids = tokens.fast.get_vocab().values()
    if tokens.fast.pad_token_id is None:
        raise UserError(f"{label}: its tokenizer has no padding token; give the tokenizer of this model")
    if max(ids, default=0) >= config.vocab_size:
        raise UserError(
            f"{label}: its tokenizer has {max(ids) + 1} tokens, and the model {config.vocab_size}; give the tokenizer "
            "of this model"
        )
    row = tokens.ids(["a"])[0]
    end = max(row, default=0) if config.eos_token_id == _LARGEST else config.eos_token_id
    if pooled_at_end and (row[-1:] != [end] or (config.eos_token_id == _LARGEST and tokens.pad_id > end)):
        raise UserError(
            f"{label}: its tokenizer does not end a text with the token {end}, at which the model reads a text; give "
            "the tokenizer of this model"
        )


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=1)
