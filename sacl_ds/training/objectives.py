"""What pre-training minimises: a batch in, a dict of losses out. It computes; it updates nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sacl_ds.config import LossConfig
from sacl_ds.data.batch import Batch
from sacl_ds.data.text import IGNORED
from sacl_ds.losses import (
    HardNegatives,
    Keys,
    Regulation,
    hard_negatives,
    masked_language_loss,
    matching_loss,
    similarity_regulated_loss,
)
from sacl_ds.model.indexing import take
from sacl_ds.model.packing import Packing
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.vision import ImageStates


@dataclass(frozen=True)
class MomentumTargets:
    """What the momentum model sees in the batch, without gradient.

    keys: its features of this rank's pairs, and the queue. soft_weight: the share of its beliefs in ITC's and MLM's
    targets. token_logits: (n, vocabulary) what it predicts for the masked tokens; None where soft_weight is 0.
    """

    keys: Keys
    soft_weight: float
    token_logits: Tensor | None


@dataclass(frozen=True)
class Targets:
    """What the step takes from outside the model.

    teacher: (image, text) unit features (b, d_t) of the frozen teacher, or None; alpha: its share of the similarity.
    generator: draws ITM's negatives. statistics: figures on mutual information among the losses as well.
    features: return the step's features beside the losses. momentum: None where there is no momentum model.
    """

    teacher: tuple[Tensor, Tensor] | None
    alpha: float
    generator: torch.Generator | None
    statistics: bool = False
    features: bool = False
    momentum: MomentumTargets | None = None


def step_regulation(loss: LossConfig, targets: Targets) -> tuple[Regulation, tuple[Tensor, Tensor] | None]:
    """How negatives are weighted at this step, and by which teacher's features."""
    if loss.contrastive == "infonce":
        return Regulation(sharpness=0.0, negative_mass=loss.negative_mass), None
    of_teacher = loss.sharpness if loss.teacher_sharpness is None else loss.teacher_sharpness
    alpha = targets.alpha if targets.teacher else 0.0
    return Regulation(alpha, loss.sharpness, of_teacher, loss.negative_mass, loss.drop_below), targets.teacher


class PretrainObjective(nn.Module):
    """ITC + ITM + MLM (ALBEF's three) with the similarity-regulated ITC."""

    def __init__(self, model: SaclModel, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.settings = loss

    def forward(
        self, batch: Batch, targets: Targets
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """0-dim tensors: `loss`, to be minimised, the terms it sums, and figures without gradient.

        Each term's mean over ranks is its value for the whole global batch, and so are the gradients. With
        targets.features also the (b, d) unit features of images and of texts that ITC compared, detached.
        """
        settings, model, b = self.settings, self.model, len(batch)
        text_states = encoded_texts(model, batch, masked=settings.mlm_weight > 0)
        text = model.text_projection(text_states[:b, 0])
        image_states, image = model.encode_image(batch.images, text_states[:b, 0] if model.captions_choose else None)
        logit_scale = model.logit_scale()
        losses = self._contrastive(image, text, logit_scale, batch, targets)
        total = settings.contrastive_weight * losses["itc"]
        negatives = None
        if settings.matching_weight:
            negatives = self._hard_negatives(image, text, logit_scale, batch, targets)
        if settings.matching_weight or settings.mlm_weight:
            fused = fused_texts(model, image_states, text_states, negatives, batch)
        if negatives is not None:
            losses |= self._matching(fused, negatives)
            total = total + settings.matching_weight * losses["itm"]
        if settings.mlm_weight:
            # behind the captions and the hard texts, where there are any
            masked = fused[:b] if negatives is None else fused[2 * b : 3 * b]
            losses["mlm"] = self._masked_language(masked, batch, targets.momentum)
            total = total + settings.mlm_weight * losses["mlm"]
        losses = {"loss": total, **losses, "logit_scale": logit_scale.detach()}
        return (losses, (image.detach(), text.detach())) if targets.features else losses

    def _contrastive(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, batch: Batch, targets: Targets
    ) -> dict[str, Tensor]:
        regulation, teacher = step_regulation(self.settings, targets)
        teacher_image, teacher_text = teacher or (None, None)
        momentum = targets.momentum
        out = similarity_regulated_loss(
            image,
            text,
            logit_scale,
            teacher_image=teacher_image,
            teacher_text=teacher_text,
            alpha=regulation.alpha,
            sharpness=regulation.sharpness,
            teacher_sharpness=regulation.teacher_sharpness,
            pair_ids=batch.pair_ids,
            negative_mass=regulation.negative_mass,
            drop_below=regulation.drop_below,
            backend=self.settings.backend,
            statistics=targets.statistics,
            keys=momentum.keys if momentum else None,
            soft_weight=momentum.soft_weight if momentum else 0.0,
        )
        return {"itc": out.loss, **(out.statistics or {})}

    def _hard_negatives(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, batch: Batch, targets: Targets
    ) -> HardNegatives:
        regulation, teacher = (
            step_regulation(self.settings, targets) if self.settings.matching_regulated else (None, None)
        )
        hardness, generator = self.settings.matching_hardness, targets.generator
        return hard_negatives(image, text, logit_scale, batch.pair_ids, hardness, regulation, teacher, generator)

    def _matching(self, fused: Tensor, negatives: HardNegatives) -> dict[str, Tensor]:
        """Of `fused_texts`: captions with their images, hard texts, and captions with hard images, which come last."""
        b = len(negatives.text)
        match_logits = self.model.match_logits(torch.cat([fused[: 2 * b, :1], fused[-b:, :1]]))
        matched = torch.arange(3 * b, device=fused.device) < b
        found = negatives.text_found
        valid = torch.cat([torch.ones_like(found), found, negatives.image_found])
        with torch.no_grad():
            right = (match_logits.argmax(1).bool() == matched) & valid
            accuracy = right.sum() / valid.sum().clamp(min=1)
        return {"itm": matching_loss(match_logits, matched, valid), "itm_accuracy": accuracy}

    def _masked_language(self, fused: Tensor, batch: Batch, momentum: MomentumTargets | None) -> Tensor:
        """fused: (b, L, width), of the masked captions."""
        assert batch.mlm_labels is not None
        predicted = _predicted(batch)
        logits = self.model.token_logits(predicted.pack(fused))
        soft, weight = (momentum.token_logits, momentum.soft_weight) if momentum else (None, 0.0)
        return masked_language_loss(logits, predicted.pack(batch.mlm_labels), None, soft, weight)


def encoded_texts(model: SaclModel, batch: Batch, masked: bool) -> Tensor:
    """States of the captions, (b, L, width), and behind them, where `masked`, of the masked captions: (2b, L, width).

    Padding is not computed where the batch says which tokens are real.
    """
    ids, mask, places = batch.input_ids, batch.attention_mask, batch.token_places
    if masked:
        assert batch.masked_ids is not None
        ids, mask = torch.cat([ids, batch.masked_ids]), mask.repeat(2, 1)
        places = _stacked([places, places], batch.input_ids)
    return model.text_encoder(ids, mask, places)


def fused_texts(
    model: SaclModel, image_states: ImageStates, text_states: Tensor, negatives: HardNegatives | None, batch: Batch
) -> Tensor:
    """All that ITM and MLM need of the fusion encoder, in one pass, so that it takes an image's keys and values once.

    text_states: as from `encoded_texts`. Returns (n, L, width), one after another: captions and each image's hard text,
    masked captions if there are any, and captions with their hard image; the masked captions alone where negatives is
    None. Where texts choose patches, each chooses its own: a masked caption by itself, since the whole one would give
    away what is masked.
    """
    b, mask, real = len(batch), batch.attention_mask, batch.token_places
    captions, masked = text_states[:b], [text_states[b:]] if len(text_states) > b else []
    if negatives is None:
        states, repeats, places = masked[0], 1, real
    else:
        hard = take(captions, negatives.text)
        states, repeats = torch.cat([captions, hard, *masked, captions]), 2 + len(masked)
        mask = torch.cat([mask, mask[negatives.text], *[mask] * len(masked), mask])
        # which texts are hard is known on the device alone, and so are their lengths
        whole = None if real is None else torch.arange(mask.shape[1] * b, device=real.device)
        places = _stacked([real, whole, *[real] * len(masked), real], batch.input_ids)
    hard_images = None if negatives is None else negatives.image
    if image_states.scored is None:
        return model.fuse(states, mask, image_states.tokens, repeats=repeats, images=hard_images, places=places)
    looked_at = None
    if hard_images is not None:
        looked_at = torch.cat([torch.arange(b, device=hard_images.device).repeat(repeats), hard_images])
    image_tokens = model.image_tokens(image_states, states[:, 0], looked_at)
    return model.fuse(states, mask, image_tokens, places=places)


def predicted_tokens(model: SaclModel, image_states: ImageStates, batch: Batch) -> Tensor:
    """(n, vocabulary) logits of the batch's masked tokens, from the masked captions and the images."""
    assert batch.masked_ids is not None
    states = model.text_encoder(batch.masked_ids, batch.attention_mask, batch.token_places)
    image_tokens = model.image_tokens(image_states, states[:, 0])
    fused = model.fuse(states, batch.attention_mask, image_tokens, places=batch.token_places)
    return model.token_logits(_predicted(batch).pack(fused))


def _predicted(batch: Batch) -> Packing:
    """Which tokens of the masked captions MLM predicts."""
    assert batch.mlm_labels is not None
    places = batch.mlm_places
    if places is None:
        places = (batch.mlm_labels.flatten() != IGNORED).nonzero().squeeze(1)
    return Packing.of(batch.mlm_labels, places)


def _stacked(parts: list[Tensor | None], ids: Tensor) -> Tensor | None:
    """Places of real tokens in several batches of texts like `ids`, (b, L), when these stand below each other."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return torch.cat([part + number * ids.numel() for number, part in enumerate(known)])
