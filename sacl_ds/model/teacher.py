"""Frozen teacher: in eval mode, without gradient, on the canonical view, outside the engine's module.

So ZeRO neither shards nor saves it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sacl_ds.data.batch import Batch, View
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.model.sacl import autocast
from sacl_ds.model.saved import identity_of, load_model


class Teacher(Protocol):
    """Model that is not trained; features are unit vectors, float32."""

    view: View  # how it sees a sample

    @property
    def identity(self) -> str:
        """Digest that is equal for two teachers that give every sample the same features."""

    def image_features(self, images: Tensor) -> Tensor:
        """Encode (b, 3, H_t, W_t) uint8 -> (b, d_t)."""

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode ids and mask, (b, L_t) int64 -> (b, d_t)."""


def teacher_features(teacher: Teacher | None, batch: Batch, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Return (b, d_t) features of images and of captions, float32: those stored in the batch, or `teacher`'s.

    precision: of the products where they are computed, as `train.precision` names it.
    """
    stored = batch.teacher_features
    if stored is not None:
        image, text = torch.nn.functional.normalize(stored.float(), dim=2).unbind(1)
        return image, text
    assert teacher is not None
    images = batch.images if batch.teacher_images is None else batch.teacher_images
    ids, mask = batch.teacher_input_ids, batch.teacher_attention_mask
    if ids is None or mask is None:
        ids, mask = batch.input_ids, batch.attention_mask
    with autocast(images.device, precision):
        return teacher.image_features(images), teacher.text_features(ids, mask)


def load_teacher(checkpoint: str, device: torch.device, setting: str = "teacher.checkpoint") -> Teacher:
    """Load a finished run's directory, or a CLIPModel or ChineseCLIPModel of transformers: its folder or hub name.

    setting: what error lines call it. Raises UserError.
    """
    folder = Path(checkpoint)
    local = folder.exists() or checkpoint.startswith(("/", ".", "~"))
    if (folder / "config.json").is_file() or not local:
        from sacl_ds.model.clip_teacher import ClipTeacher

        return ClipTeacher(checkpoint, device, setting)
    return RunTeacher(checkpoint, device, setting)


class RunTeacher:
    """Teacher from a finished run's dual encoder."""

    def __init__(self, folder: str, device: torch.device, setting: str) -> None:
        """Raises UserError where the folder holds no finished run."""
        model, run, tokenizer = load_model(folder, setting)
        self.model = model.requires_grad_(False).eval().to(device)
        self.view = View(CanonicalView(run.model.image_size), tokenizer)
        self._settings = run.model.model_dump_json()

    @property
    def identity(self) -> str:
        return identity_of(self.model, self._settings, self.view.tokenizer.fingerprint)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Encode (b, 3, H_t, W_t) uint8 -> (b, d_t) unit float32."""
        return self.model.encode_image(images)[1]

    @torch.no_grad()
    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode ids and mask, (b, L_t) int64 -> (b, d_t) unit float32."""
        return self.model.encode_text(input_ids, attention_mask)[1]
