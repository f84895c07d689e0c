"""Objective of pre-training: ITC, ITM and MLM of a batch (ALBEF's three losses). It computes; it updates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sacl_ds.config import LossConfig
from sacl_ds.data.batch import Batch
from sacl_ds.distributed import sum_over_ranks, world_size
from sacl_ds.losses import (
    ContrastiveOutput,
    HardNegatives,
    Regulation,
    Weighting,
    global_mean,
    hard_negatives,
    masked_language_loss,
    matching_loss,
    similarity_regulated_loss,
)
from sacl_ds.model.sacl import SaclModel, encoded_texts, fused_texts, masked_texts, predictions
from sacl_ds.model.vision import ImageStates

if TYPE_CHECKING:
    from sacl_ds.losses import Keys

Features = tuple[Tensor, Tensor]  # (b, d) of images and of texts


@dataclass(frozen=True)
class Targets:
    """Targets of a batch of b pairs, from outside the model.

    teacher: (image, text) unit features (b, d_t) of the frozen teacher, or None; alpha: its share of the similarity.
    generator: draws ITM's negatives. statistics: return figures on mutual information as well. even: every rank holds
    equally many pairs, so that ranks need not ask each other.

    keys: the momentum model's features of these pairs, and the queue; None without a momentum model. soft_weight: the
    momentum model's share of the targets of ITC and MLM. token_logits: (n, vocabulary) its logits of the masked tokens;
    None where soft_weight is 0.
    """

    teacher: Features | None
    alpha: float
    generator: torch.Generator | None
    statistics: bool = False
    even: bool = False
    keys: Keys | None = None
    soft_weight: float = 0.0
    token_logits: Tensor | None = None


@dataclass(frozen=True)
class CachedGradients:
    """Gradients that a micro-batch of b pairs takes from the contrastive loss of all (`sacl_ds.training.step`).

    image, text: (b, d) gradient of the weighted contrastive loss in its features; logit_scale: 0-dim, its share of the
    gradient in the logit scale. negatives: ITM's, None without ITM. pairings, tokens: 0-dim, how many pairings and
    masked tokens the means of ITM and MLM run over. soft_weight, token_logits: as in Targets.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    negatives: HardNegatives | None
    pairings: Tensor
    tokens: Tensor
    soft_weight: float = 0.0
    token_logits: Tensor | None = None


def step_regulation(loss: LossConfig, targets: Targets) -> tuple[Regulation, Features | None]:
    """Return the regulation at a step, and the teacher's features where it needs them."""
    if loss.contrastive == "infonce":
        return Regulation(sharpness=0.0, negative_mass=loss.negative_mass), None
    of_teacher = loss.sharpness if loss.teacher_sharpness is None else loss.teacher_sharpness
    alpha = targets.alpha if targets.teacher else 0.0
    return Regulation(alpha, loss.sharpness, of_teacher, loss.negative_mass, loss.drop_below), targets.teacher


class PretrainObjective(nn.Module):
    """ITC + ITM + MLM with the similarity-regulated ITC, over the model in its attribute `model`.

    Only those of the model's parameters that the losses reach are set to be trained (`SaclModel.train_for`).
    """

    def __init__(self, model: SaclModel, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.settings = loss
        self._agreed = False
        model.train_for(matching=loss.matching_weight > 0, words=loss.mlm_weight > 0)

    def forward(self, batch: Batch, targets: Targets | CachedGradients | None) -> dict[str, Tensor]:
        """Compute features and losses of a batch of b pairs, by name.

        With Targets: `loss`, 0-dim, to be minimised; the terms it sums, `itc`, `itm` and `mlm`, and further 0-dim
        figures, detached; `logit_scale`, and `image`, `text`: (b, d) unit features that ITC compared, detached. Each
        term's mean over ranks is its value for the whole global batch, and so are the gradients.

        With CachedGradients: `loss` has the gradients of this micro-batch's share of all losses; `itm`, `mlm` and their
        figures add up over micro-batches.

        Without targets: `image`, `text` and `logit_scale` alone, differentiable.
        """
        model, b, mlm = self.model, len(batch), self.settings.mlm_weight > 0
        # with cached gradients captions go first and alone: the random numbers are those of the pass before
        text_states = encoded_texts(model, batch, masked=mlm and isinstance(targets, Targets))
        text = model.text_projection(text_states[:b, 0])
        image_states, image = model.encode_image(batch.images, text_states[:b, 0] if model.captions_choose else None)
        logit_scale = model.logit_scale()
        if targets is None:
            return {"image": image, "text": text, "logit_scale": logit_scale}
        if isinstance(targets, CachedGradients):
            if mlm:
                text_states = torch.cat([text_states, masked_texts(model, batch)])
            itc = (image * targets.image).sum() + (text * targets.text).sum() + logit_scale * targets.logit_scale
            fused = self._fused(image_states, text_states, batch, targets.negatives, targets)
            return {"loss": itc + self.weighted(fused), **fused}
        contrastive = self.contrastive(image, text, logit_scale, batch.pair_ids, targets)
        negatives = None
        if self.settings.matching_weight:
            weighting = self.weighting(targets, contrastive.least_kept)
            negatives = self.hard_negatives(image, text, logit_scale, batch.pair_ids, weighting, targets.generator)
        losses = {"itc": contrastive.loss, **(contrastive.statistics or {})}
        losses |= self._fused(image_states, text_states, batch, negatives, targets)
        features = {"image": image.detach(), "text": text.detach(), "logit_scale": logit_scale.detach()}
        return {"loss": self.weighted(losses), **losses, **features}

    def weighted(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum, 0-dim, of those of ITC, ITM and MLM that `losses` holds."""
        settings = self.settings
        weights = {"itc": settings.contrastive_weight, "itm": settings.matching_weight, "mlm": settings.mlm_weight}
        terms = [weight * losses[name] for name, weight in weights.items() if name in losses]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def contrastive(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, pair_ids: Tensor, targets: Targets
    ) -> ContrastiveOutput:
        """Compute ITC of (b, d) unit features with (b, k) ids.

        Ranks ask each other what they bring the first time; after that it travels with the ids, and a GPU is waited
        for at logged steps alone.
        """
        regulation, teacher = step_regulation(self.settings, targets)
        teacher_image, teacher_text = teacher or (None, None)
        known = targets.even and self._agreed
        self._agreed = True
        return similarity_regulated_loss(
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
            keys=targets.keys,
            soft_weight=targets.soft_weight,
            counts=[len(image)] * world_size() if known else None,
        )

    def weighting(self, targets: Targets, least_kept: Features | None) -> Weighting | None:
        """Return ITC's weighting of these pairs where ITM's draw follows it (`loss.matching_regulated`), else None.

        least_kept: `ContrastiveOutput.least_kept` of these pairs.
        """
        if not self.settings.matching_regulated:
            return None
        keys = (targets.keys.image, targets.keys.text) if targets.keys else None
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
        """Draw ITM's negatives among pairs with these (b, d) features and (b, k) ids."""
        hardness = self.settings.matching_hardness
        return hard_negatives(image, text, logit_scale, pair_ids, hardness, weighting, generator)

    def _fused(
        self,
        image_states: ImageStates,
        text_states: Tensor,
        batch: Batch,
        negatives: HardNegatives | None,
        targets: Targets | CachedGradients,
    ) -> dict[str, Tensor]:
        """Compute `itm` if there are negatives, and `mlm` if its weight is not 0, in one pass of the fusion encoder."""
        losses: dict[str, Tensor] = {}
        if negatives is None and not self.settings.mlm_weight:
            return losses
        b = len(batch)
        pairings, tokens = (targets.pairings, targets.tokens) if isinstance(targets, CachedGradients) else (None, None)
        hard = None if negatives is None else (negatives.text, negatives.image)
        fused = fused_texts(self.model, image_states, text_states, hard, batch)
        if negatives is not None:
            losses |= self._matching(fused, negatives, pairings)
        if self.settings.mlm_weight:
            # after the captions and the hard texts, where there are any
            masked = fused[:b] if negatives is None else fused[2 * b : 3 * b]
            logits, labels = predictions(self.model, masked, batch)
            soft, weight = targets.token_logits, targets.soft_weight
            losses["mlm"] = masked_language_loss(logits, labels, None, soft, weight, tokens)
        return losses

    def _matching(self, fused: Tensor, negatives: HardNegatives, pairings: Tensor | None) -> dict[str, Tensor]:
        """ITM over `fused_texts`: captions with their images, hard texts, and captions with hard images, which come
        last.

        pairings: 0-dim, how many the means run over; None: those of this step on all ranks.
        """
        b = len(negatives.text)
        logits = self.model.match_logits(torch.cat([fused[: 2 * b, :1], fused[-b:, :1]]))
        matched = torch.arange(3 * b, device=fused.device) < b
        valid = negatives.valid
        total = sum_over_ranks(valid.sum().double()) if pairings is None else pairings
        right = (logits.detach().argmax(1).bool() == matched).to(logits.dtype)
        accuracy = global_mean(right, valid.to(logits.dtype), total=total)
        return {"itm": matching_loss(logits, matched, valid, total=total), "itm_accuracy": accuracy}
