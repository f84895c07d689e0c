"""What pre-training minimises: a batch in, a dict of losses out. It computes; it updates nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sacl_ds.config import LossConfig
from sacl_ds.data.batch import Batch
from sacl_ds.data.text import IGNORED
from sacl_ds.losses import masked_language_loss, matching_loss, sample_negatives, similarity_regulated_loss
from sacl_ds.model.sacl import SaclModel


@dataclass(frozen=True)
class Targets:
    """What the step takes from outside the model.

    teacher: (image, text) unit features (b, d_t) of the frozen teacher, or None; alpha: its share of the similarity.
    generator: draws ITM's negatives.
    """

    teacher: tuple[Tensor, Tensor] | None
    alpha: float
    generator: torch.Generator | None
    statistics: bool = False


class PretrainObjective(nn.Module):
    """ITC + ITM + MLM (ALBEF's three) with the similarity-regulated ITC."""

    def __init__(self, model: SaclModel, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.settings = loss

    def forward(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """0-dim tensors: `loss`, to be minimised, the terms it sums, and figures without gradient.

        Each term's mean over ranks is its value for the whole global batch, and so are the gradients.
        """
        settings, model = self.settings, self.model
        image_tokens, image = model.encode_image(batch.images)
        text_states, text = model.encode_text(batch.input_ids, batch.attention_mask)
        logit_scale = model.logit_scale()
        losses = self._contrastive(image, text, logit_scale, batch, targets)
        total = settings.contrastive_weight * losses["itc"]
        if settings.matching_weight:
            with torch.no_grad():
                logits = logit_scale * image @ text.T
            losses |= self._matching(image_tokens, text_states, logits, batch, targets)
            total = total + settings.matching_weight * losses["itm"]
        if settings.mlm_weight:
            losses["mlm"] = self._masked_language(image_tokens, batch)
            total = total + settings.mlm_weight * losses["mlm"]
        return {"loss": total, **losses, "logit_scale": logit_scale.detach()}

    def _contrastive(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, batch: Batch, targets: Targets
    ) -> dict[str, Tensor]:
        settings = self.settings
        regulated = settings.contrastive == "sacl"
        teacher_image, teacher_text = targets.teacher if regulated and targets.teacher else (None, None)
        out = similarity_regulated_loss(
            image,
            text,
            logit_scale,
            teacher_image=teacher_image,
            teacher_text=teacher_text,
            alpha=targets.alpha if teacher_image is not None else 0.0,
            sharpness=settings.sharpness if regulated else 0.0,
            teacher_sharpness=settings.teacher_sharpness if regulated else None,
            pair_ids=batch.pair_ids,
            negative_mass=settings.negative_mass,
            drop_below=settings.drop_below if regulated else None,
            backend=settings.backend,
            statistics=targets.statistics,
        )
        return {"itc": out.loss, **(out.statistics or {})}

    def _matching(
        self, image_tokens: Tensor, text_states: Tensor, logits: Tensor, batch: Batch, targets: Targets
    ) -> dict[str, Tensor]:
        """Matched pairs, each image with a hard text, and each text with a hard image, in one pass."""
        b = len(batch)
        hardness = self.settings.matching_hardness
        hard_text, text_found = sample_negatives(logits, batch.pair_ids, targets.generator, hardness)
        hard_image, image_found = sample_negatives(logits.T, batch.pair_ids, targets.generator, hardness)
        own = torch.arange(b, device=logits.device)
        texts, images = torch.cat([own, hard_text, own]), torch.cat([own, own, hard_image])
        fused = self.model.fuse(text_states[texts], batch.attention_mask[texts], image_tokens[images])
        matched = torch.arange(3 * b, device=logits.device) < b
        valid = torch.cat([torch.ones_like(text_found), text_found, image_found])
        match_logits = self.model.match_logits(fused)
        with torch.no_grad():
            right = (match_logits.argmax(1).bool() == matched) & valid
            accuracy = right.sum() / valid.sum().clamp(min=1)
        return {"itm": matching_loss(match_logits, matched, valid), "itm_accuracy": accuracy}

    def _masked_language(self, image_tokens: Tensor, batch: Batch) -> Tensor:
        assert batch.masked_ids is not None
        assert batch.mlm_labels is not None
        states = self.model.text_encoder(batch.masked_ids, batch.attention_mask)
        fused = self.model.fuse(states, batch.attention_mask, image_tokens)
        predicted = batch.mlm_labels != IGNORED
        return masked_language_loss(self.model.token_logits(fused[predicted]), batch.mlm_labels[predicted])
