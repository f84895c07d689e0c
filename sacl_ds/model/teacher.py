"""The frozen teacher: in eval mode, without gradient, on the canonical view, outside the engine's module.

So ZeRO neither shards nor saves it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sacl_ds.data.batch import Batch, View
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.model.clip_teacher import ClipTeacher, is_clip
from sacl_ds.model.saved import load_model


class Teacher(Protocol):
    view: View  # how it sees a sample

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(b, d_t) image features and (b, d_t) text features, unit length, float32."""


def load_teacher(checkpoint: str, device: torch.device) -> Teacher:
    """A finished run's directory, or a CLIPModel of transformers: its folder or its hub name. Raises UserError."""
    folder = Path(checkpoint)
    local = folder.exists() or checkpoint.startswith(("/", ".", "~"))
    if is_clip(folder) or not local:
        return ClipTeacher(checkpoint, device)
    return RunTeacher(checkpoint, device)


class RunTeacher:
    """The dual encoder of a finished run."""

    def __init__(self, folder: str, device: torch.device) -> None:
        """Raises UserError where the folder holds no finished run."""
        model, run, tokenizer = load_model(folder, "teacher.checkpoint")
        self.model = model.requires_grad_(False).eval().to(device)
        self.view = View(CanonicalView(run.model.image_size), tokenizer)

    @torch.no_grad()
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(b, d_t) image features and (b, d_t) text features, unit length, float32."""
        images = batch.images if batch.teacher_images is None else batch.teacher_images
        ids, mask = batch.teacher_input_ids, batch.teacher_attention_mask
        if ids is None or mask is None:
            ids, mask = batch.input_ids, batch.attention_mask
        return self.model.encode_image(images)[1], self.model.encode_text(ids, mask)[1]
