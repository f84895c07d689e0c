"""What pre-training minimises: a batch in, a dict of losses out. It computes; it updates nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sacl_ds.config import LossConfig
from sacl_ds.data.batch import Batch
from sacl_ds.data.text import IGNORED
from sacl_ds.distributed import sum_over_ranks
from sacl_ds.losses import (
    HardNegatives,
    Keys,
    Regulation,
    hard_negatives,
    masked_language_loss,
    global_mean,
    matching_loss,
    similarity_regulated_loss,
)
from sacl_ds.model.indexing import take
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


@dataclass(frozen=True)
class MicroTargets:
    """What a micro-batch of b pairs takes from its step (`sacl_ds.training.accumulation`).

    image, text: (b, d) the gradient of the weighted contrastive loss in its features; logit_scale: 0-dim, its share of
    that in the temperature. negatives: ITM's, None without ITM. pairings, words: 0-dim, how many ITM's and MLM's means
    are over. soft_weight, token_logits: as in MomentumTargets.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    negatives: HardNegatives | None
    pairings: Tensor
    words: Tensor
    soft_weight: float = 0.0
    token_logits: Tensor | None = None


Out = dict[str, Tensor]  # losses and figures, 0-dim


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
        self, batch: Batch, targets: Targets | MicroTargets | None
    ) -> Out | tuple[Out, tuple[Tensor, Tensor]] | tuple[Tensor, Tensor, Tensor]:
        """0-dim tensors: `loss`, to be minimised, the terms it sums, and figures without gradient.

        Each term's mean over ranks is its value for the whole global batch, and so are the gradients. With
        targets.features also the (b, d) unit features of images and of texts that ITC compared, detached.

        With MicroTargets `loss` has the gradients of this micro-batch's share, terms add up over micro-batches, and ITC
        is none of them. Without targets, of the first pass: unit features of images and of texts, and the logit scale.
        """
        model = self.model
        text_states, text = model.encode_text(batch.input_ids, batch.attention_mask)
        image_states, image = model.encode_image(batch.images, text_states[:, 0] if model.captions_choose else None)
        logit_scale = model.logit_scale()
        if targets is None:
            return image, text, logit_scale
        if isinstance(targets, MicroTargets):
            losses = self._fused(image_states, text_states, batch, targets.negatives, targets)
            met = (image * targets.image).sum() + (text * targets.text).sum() + logit_scale * targets.logit_scale
            return {"loss": met + self.weighted(losses), **losses}
        losses = self.contrastive(image, text, logit_scale, batch.pair_ids, targets)
        negatives = None
        if self.settings.matching_weight:
            negatives = self.hard_negatives(image, text, logit_scale, batch.pair_ids, targets)
        losses |= self._fused(image_states, text_states, batch, negatives, targets.momentum)
        losses = {"loss": self.weighted(losses), **losses, "logit_scale": logit_scale.detach()}
        return (losses, (image.detach(), text.detach())) if targets.features else losses

    def weighted(self, losses: Out) -> Tensor:
        """The sum of the terms that there are, each with its weight."""
        settings = self.settings
        weights = {"itc": settings.contrastive_weight, "itm": settings.matching_weight, "mlm": settings.mlm_weight}
        terms = [weight * losses[name] for name, weight in weights.items() if name in losses]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def contrastive(self, image: Tensor, text: Tensor, logit_scale: Tensor, pair_ids: Tensor, targets: Targets) -> Out:
        """`itc` of (b, d) features with (b, k) ids, and figures where targets.statistics."""
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
            pair_ids=pair_ids,
            negative_mass=regulation.negative_mass,
            drop_below=regulation.drop_below,
            backend=self.settings.backend,
            statistics=targets.statistics,
            keys=momentum.keys if momentum else None,
            soft_weight=momentum.soft_weight if momentum else 0.0,
        )
        return {"itc": out.loss, **(out.statistics or {})}

    def hard_negatives(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, pair_ids: Tensor, targets: Targets
    ) -> HardNegatives:
        """ITM's, of pairs with these (b, d) features and (b, k) ids."""
        regulation, teacher = (
            step_regulation(self.settings, targets) if self.settings.matching_regulated else (None, None)
        )
        hardness, generator = self.settings.matching_hardness, targets.generator
        return hard_negatives(image, text, logit_scale, pair_ids, hardness, regulation, teacher, generator)

    def _fused(self, image_states, text_states, batch, negatives, more) -> Out:
        losses = {}
        if negatives is not None:
            losses |= self._matching(image_states, text_states, negatives, batch, more)
        if self.settings.mlm_weight:
            losses["mlm"] = self._masked_language(image_states, batch, more)
        return losses

    def _matching(
        self, image_states: ImageStates, text_states: Tensor, negatives: HardNegatives, batch: Batch, more
    ) -> dict[str, Tensor]:
        """Matched pairs, each image with a hard text, and each text with a hard image, in one pass."""
        b = len(batch)
        own = torch.arange(b, device=text_states.device)
        texts, images = torch.cat([own, negatives.text, own]), torch.cat([own, own, negatives.image])
        states = take(text_states, texts)
        image_tokens = self.model.image_tokens(image_states, states[:, 0], images)
        fused = self.model.fuse(states, batch.attention_mask[texts], image_tokens)
        matched = torch.arange(3 * b, device=text_states.device) < b
        valid = negatives.valid
        total = more.pairings if isinstance(more, MicroTargets) else sum_over_ranks(valid.sum().double())
        match_logits = self.model.match_logits(fused)
        right = (match_logits.detach().argmax(1).bool() == matched).to(match_logits.dtype)
        accuracy = global_mean(right, valid.to(right.dtype), total=total)
        return {"itm": matching_loss(match_logits, matched, valid, total=total), "itm_accuracy": accuracy}

    def _masked_language(self, image_states: ImageStates, batch: Batch, more) -> Tensor:
        assert batch.mlm_labels is not None
        labels = batch.mlm_labels[batch.mlm_labels != IGNORED]
        soft, weight = (more.token_logits, more.soft_weight) if more else (None, 0.0)
        total = more.words if isinstance(more, MicroTargets) else None
        return masked_language_loss(predicted_tokens(self.model, image_states, batch), labels, None, soft, weight, total)


def predicted_tokens(model: SaclModel, image_states: ImageStates, batch: Batch) -> Tensor:
    """(n, vocabulary) logits of the batch's masked tokens, from the masked captions and the images."""
    assert batch.masked_ids is not None
    assert batch.mlm_labels is not None
    states = model.text_encoder(batch.masked_ids, batch.attention_mask)
    # the masked caption chooses its patches: the whole one would give away what is masked
    image_tokens = model.image_tokens(image_states, states[:, 0])
    fused = model.fuse(states, batch.attention_mask, image_tokens)
    return model.token_logits(fused[batch.mlm_labels != IGNORED])
