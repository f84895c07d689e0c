"""A teacher from elsewhere: a CLIPModel or ChineseCLIPModel of transformers, with its own preprocessing and words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ChineseCLIPModel, CLIPModel

from sacl_ds.data.batch import View
from sacl_ds.data.pictures import Picture
from sacl_ds.errors import CannotLoad, UserError
from sacl_ds.model.saved import identity_of

_MODELS = {"clip": CLIPModel, "chinese_clip": ChineseCLIPModel}
_OF_THE_FILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True)
class ClipPixels:
    """The processor's resizing and cropping, left in uint8; `ClipTeacher` rescales and normalises on the device."""

    processor: Any  # an image processor of transformers

    @property
    def size(self) -> int:
        return int(self.processor.crop_size["height"])

    def __call__(self, picture: Picture, entropy: tuple[int, ...]) -> Tensor:
        """(3, size, size) uint8; `entropy` is not used. Raises BadImage."""
        made = self.processor(picture.pixels(), do_rescale=False, do_normalize=False, return_tensors="pt")
        return made["pixel_values"][0].to(torch.uint8)


@dataclass(frozen=True)
class ClipTokens:
    """The model's tokenizer, cut to the positions that it has, or to the length that the tokenizer names."""

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
    """A frozen CLIPModel or ChineseCLIPModel, an export of ours among them, as a `Teacher`."""

    def __init__(self, name_or_folder: str, device: torch.device, setting: str) -> None:
        """A folder written by save_pretrained of model and processor, or a hub name. Raises UserError."""
        try:
            kind = AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False).model_type
            if kind not in _MODELS:
                raise UserError(
                    f"{setting}={name_or_folder} holds a model of type {kind!r}; give a CLIPModel or ChineseCLIPModel, "
                    "or the directory of a finished run"
                )
            model: Any = _MODELS[kind].from_pretrained(name_or_folder, attn_implementation="sdpa")
            processor = AutoImageProcessor.from_pretrained(name_or_folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # as in `Tokenizer.load`
            raise CannotLoad(setting, name_or_folder, error) from None
        crop = processor.crop_size if processor.do_center_crop else processor.size
        if not crop or crop.get("height") != crop.get("width"):
            raise UserError(f"{setting}={name_or_folder}: its preprocessing does not end in square images")
        self.model = model.requires_grad_(False).eval().to(device)
        self._processor = processor
        longest = min(model.config.text_config.max_position_embeddings, tokenizer.model_max_length)
        self.view = View(ClipPixels(processor), ClipTokens(tokenizer, longest))
        self.rescale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        shape = (1, 3, 1, 1)
        zero, one = [0.0] * 3, [1.0] * 3
        self.mean = torch.tensor(processor.image_mean if processor.do_normalize else zero, device=device).view(shape)
        self.std = torch.tensor(processor.image_std if processor.do_normalize else one, device=device).view(shape)

    @property
    def identity(self) -> str:
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in _OF_THE_FILE}
        settings = json.dumps([config, self._processor.to_dict()], sort_keys=True, default=str)
        return identity_of(self.model, settings, self.view.tokenizer.fingerprint)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """(b, 3, H_t, W_t) uint8 -> (b, d_t) unit float32."""
        pixels = (images.float() * self.rescale - self.mean) / self.std
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, L_t) int64, twice -> (b, d_t) unit float32."""
        return _unit(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=1)
