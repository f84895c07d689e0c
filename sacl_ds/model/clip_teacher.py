"""A teacher from elsewhere: a CLIPModel of transformers, with its own preprocessing and tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from sacl_ds.data.batch import Batch, View
from sacl_ds.errors import UserError, cannot_load


@dataclass(frozen=True)
class ClipPixels:
    """The processor's resizing and cropping, left in uint8; `ClipTeacher` rescales and normalises on the device."""

    processor: CLIPImageProcessor

    @property
    def size(self) -> int:
        return int(self.processor.crop_size["height"])

    def __call__(self, image: Image.Image, entropy: tuple[int, ...]) -> Tensor:
        """(3, size, size) uint8; `entropy` is not used."""
        made = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        return made["pixel_values"][0].to(torch.uint8)


@dataclass(frozen=True)
class ClipTokens:
    """CLIP's tokenizer, cut to the positions that the model has."""

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
    """A frozen CLIPModel as a `Teacher`."""

    def __init__(self, name_or_folder: str, device: torch.device) -> None:
        """A folder written by save_pretrained of model and processor, or a hub name. Raises UserError."""
        try:
            model = CLIPModel.from_pretrained(name_or_folder)
            processor = CLIPImageProcessor.from_pretrained(name_or_folder)
            tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
        except (OSError, ValueError) as error:
            raise cannot_load("teacher.checkpoint", name_or_folder, error) from None
        crop = processor.crop_size if processor.do_center_crop else processor.size
        if not crop or crop.get("height") != crop.get("width"):
            raise UserError(f"teacher.checkpoint={name_or_folder}: its preprocessing does not end in square images")
        self.model = model.requires_grad_(False).eval().to(device)
        self.view = View(ClipPixels(processor), ClipTokens(tokenizer, model.config.text_config.max_position_embeddings))
        self.rescale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        shape = (1, 3, 1, 1)
        zero, one = [0.0] * 3, [1.0] * 3
        self.mean = torch.tensor(processor.image_mean if processor.do_normalize else zero, device=device).view(shape)
        self.std = torch.tensor(processor.image_std if processor.do_normalize else one, device=device).view(shape)

    @torch.no_grad()
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(b, d_t) image features and (b, d_t) text features, unit length, float32."""
        images, ids, mask = batch.teacher_images, batch.teacher_input_ids, batch.teacher_attention_mask
        assert images is not None
        assert ids is not None
        pixels = (images.float() * self.rescale - self.mean) / self.std
        image = self.model.get_image_features(pixel_values=pixels).pooler_output
        text = self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return _unit(image), _unit(text)


def is_clip(folder: Path) -> bool:
    """Whether a local folder holds a model of transformers, as against a run of ours."""
    return (folder / "config.json").is_file()


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=1)
