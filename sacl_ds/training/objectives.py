"""What pre-training minimises: a batch in, a dict of losses out. It computes; it updates nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sacl_ds.config import LossConfig
from sacl_ds.data.batch import Batch
from sacl_ds.distributed import sum_over_ranks, world_size
from sacl_ds.losses import (
    HardNegatives,
    Keys,
    Regulation,
    Weighting,
    global_mean,
    hard_negatives,
    masked_language_loss,
    matching_loss,
    similarity_regulated_loss,
)
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.vision import ImageStates
from sacl_ds.training.passes import encoded_texts, fused_texts, masked_texts, predictions


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
    generator: draws ITM's negatives. statistics: figures on mutual information among the losses as well. even: every
    rank holds as many pairs, which need not be asked for.
    features: return the step's features beside the losses. momentum: None where there is no momentum model.
    """

    teacher: tuple[Tensor, Tensor] | None
    alpha: float
    generator: torch.Generator | None
    statistics: bool = False
    features: bool = False
    momentum: MomentumTargets | None = None
    even: bool = False


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
Features = tuple[Tensor, Tensor]  # (b, d) of images and of texts
LeastKept = tuple[Tensor, Tensor] | None  # `ContrastiveOutput.least_kept`


def step_regulation(loss: LossConfig, targets: Targets) -> tuple[Regulation, tuple[Tensor, Tensor] | None]:
    """How negatives are weighted at this step, and by which teacher's features."""
    if loss.contrastive == "infonce":
        return Regulation(sharpness=0.0, negative_mass=loss.negative_mass), None
    of_teacher = loss.sharpness if loss.teacher_sharpness is None else loss.teacher_sharpness
    alpha = targets.alpha if targets.teacher else 0.0
    return Regulation(alpha, loss.sharpness, of_teacher, loss.negative_mass, loss.drop_below), targets.teacher


class PretrainObjective(nn.Module):
    """ITC + ITM + MLM (ALBEF's three) with the similarity-regulated ITC.

    Of the model's parameters those are set to be trained that the losses reach (`SaclModel.train_for`).
    """

    def __init__(self, model: SaclModel, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.settings = loss
        model.train_for(matching=loss.matching_weight > 0, words=loss.mlm_weight > 0)

    def forward(
        self, batch: Batch, targets: Targets | MicroTargets | None
    ) -> Out | tuple[Out, Features] | tuple[Tensor, Tensor, Tensor]:
        """0-dim tensors: `loss`, to be minimised, the terms it sums, and figures without gradient.

        Each term's mean over ranks is its value for the whole global batch, and so are the gradients. With
        targets.features also the (b, d) unit features of images and of texts that ITC compared, detached.

        With MicroTargets `loss` has the gradients of this micro-batch's share in them, terms and figures add up over
        micro-batches, and ITC is none of them. Without targets: features of images and of texts, and the logit scale.
        """
        if targets is None:
            return self._features(batch)
        if isinstance(targets, MicroTargets):
            return self._share(batch, targets)
        model, b = self.model, len(batch)
        text_states = encoded_texts(model, batch, masked=self.settings.mlm_weight > 0)
        text = model.text_projection(text_states[:b, 0])
        image_states, image = model.encode_image(batch.images, text_states[:b, 0] if model.captions_choose else None)
        logit_scale = model.logit_scale()
        losses, least_kept = self.contrastive(image, text, logit_scale, batch.pair_ids, targets)
        negatives = None
        if self.settings.matching_weight:
            weighting = self.weighting(targets, least_kept)
            negatives = self.hard_negatives(image, text, logit_scale, batch.pair_ids, weighting, targets.generator)
        losses |= self._fused(image_states, text_states, batch, negatives, targets.momentum)
        losses = {"loss": self.weighted(losses), **losses, "logit_scale": logit_scale.detach()}
        return (losses, (image.detach(), text.detach())) if targets.features else losses

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        text_states, text = model.encode_text(batch.input_ids, batch.attention_mask, batch.token_places)
        image = model.encode_image(batch.images, text_states[:, 0] if model.captions_choose else None)[1]
        return image, text, model.logit_scale()

    def _share(self, batch: Batch, targets: MicroTargets) -> Out:
        """A micro-batch's, drawing random numbers as `_features` does to begin with."""
        model = self.model
        text_states, text = model.encode_text(batch.input_ids, batch.attention_mask, batch.token_places)
        image_states, image = model.encode_image(batch.images, text_states[:, 0] if model.captions_choose else None)
        met = (image * targets.image).sum() + (text * targets.text).sum() + model.logit_scale() * targets.logit_scale
        if self.settings.mlm_weight:
            text_states = torch.cat([text_states, masked_texts(model, batch)])
        losses = self._fused(image_states, text_states, batch, targets.negatives, targets)
        return {"loss": met + self.weighted(losses), **losses}

    def weighted(self, losses: Out) -> Tensor:
        """The sum of the terms that there are, each with its weight."""
        settings = self.settings
        weights = {"itc": settings.contrastive_weight, "itm": settings.matching_weight, "mlm": settings.mlm_weight}
        terms = [weight * losses[name] for name, weight in weights.items() if name in losses]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def contrastive(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, pair_ids: Tensor, targets: Targets
    ) -> tuple[Out, LeastKept]:
        """`itc` of (b, d) features with (b, k) ids, and figures if targets.statistics; and drop_below's bounds."""
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
            counts=[len(image)] * world_size() if targets.even else None,
        )
        return {"itc": out.loss, **(out.statistics or {})}, out.least_kept

    def weighting(self, targets: Targets, least_kept: LeastKept) -> Weighting | None:
        """How ITC weighs this rank's negatives, if ITM's draw follows it."""
        if not self.settings.matching_regulated:
            return None
        keys = (targets.momentum.keys.image, targets.momentum.keys.text) if targets.momentum else None
        return Weighting(*step_regulation(self.settings, targets), least_kept, keys)

    def hard_negatives(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        pair_ids: Tensor,
        weighting: Weighting | None,
        generator: torch.Generator | None,
    ) -> HardNegatives:
        """ITM's, of pairs with these (b, d) features and (b, k) ids."""
        hardness = self.settings.matching_hardness
        return hard_negatives(image, text, logit_scale, pair_ids, hardness, weighting, generator)

    def _fused(
        self,
        image_states: ImageStates,
        text_states: Tensor,
        batch: Batch,
        negatives: HardNegatives | None,
        more: MomentumTargets | MicroTargets | None,
    ) -> Out:
        """`itm` where there are negatives, and `mlm` where its weight is not 0."""
        losses: Out = {}
        if negatives is None and not self.settings.mlm_weight:
            return losses
        b = len(batch)
        pairings, words = (more.pairings, more.words) if isinstance(more, MicroTargets) else (None, None)
        fused = fused_texts(self.model, image_states, text_states, negatives, batch)
        if negatives is not None:
            losses |= self._matching(fused, negatives, pairings)
        if self.settings.mlm_weight:
            # behind the captions and the hard texts, where there are any
            masked = fused[:b] if negatives is None else fused[2 * b : 3 * b]
            soft, weight = (more.token_logits, more.soft_weight) if more else (None, 0.0)
            logits, labels = predictions(self.model, masked, batch)
            losses["mlm"] = masked_language_loss(logits, labels, None, soft, weight, words)
        return losses

    def _matching(self, fused: Tensor, negatives: HardNegatives, pairings: Tensor | None) -> Out:
        """Of `fused_texts`: captions with their images, hard texts, and captions with hard images, which come last.

        pairings: 0-dim, how many the means are over; None: those of this step on all ranks.
        """
        b = len(negatives.text)
        logits = self.model.match_logits(torch.cat([fused[: 2 * b, :1], fused[-b:, :1]]))
        matched = torch.arange(3 * b, device=fused.device) < b
        valid = negatives.valid
        total = sum_over_ranks(valid.sum().double()) if pairings is None else pairings
        right = (logits.detach().argmax(1).bool() == matched).to(logits.dtype)
        accuracy = global_mean(right, valid.to(logits.dtype), total=total)
        return {"itm": matching_loss(logits, matched, valid, total=total), "itm_accuracy": accuracy}
