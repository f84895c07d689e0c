"""The frozen teacher: a finished run's dual encoder, in eval mode, without gradient, on the canonical view.

It lives outside the engine's module, so ZeRO neither shards nor saves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_ds.data.batch import Batch, View
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.model.saved import load_model


class Teacher:
    def __init__(self, folder: str, device: torch.device) -> None:
        """folder: a finished run (`teacher.checkpoint`). Raises UserError where it holds none."""
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
