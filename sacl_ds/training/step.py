"""Training step up to its gradients: targets, losses, backward. The optimizer's step follows in the task.

Pre-training's contrastive loss needs the features of all pairs at once. Where a rank's pairs fit, one pass does. Where
they do not (`train.micro_batch_size`), a gradient cache (Gao et al. 2021, arXiv 2101.06983) gives the gradients of one
pass at the memory of one micro-batch. ITM's negatives come from the micro-batch, as they come from the rank's batch
where there is one pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sacl_ds.data.batch import Batch, ahead
from sacl_ds.data.draws import words
from sacl_ds.data.loader import Loadable
from sacl_ds.data.text import IGNORED
from sacl_ds.distributed import sum_over_ranks
from sacl_ds.losses import HardNegatives
from sacl_ds.model.teacher import Teacher, teacher_features
from sacl_ds.training.engine import forget_order
from sacl_ds.training.objective import CachedGradients, Features, PretrainObjective, Targets

if TYPE_CHECKING:  # not every run has one
    from sacl_ds.model.momentum import Momentum

Losses = dict[str, Tensor]  # by name, 0-dim, detached


@dataclass(frozen=True)
class Step:
    """Parameters of a step on this rank, known before its batch.

    number: steps done. seed: of everything random in it; generator: seeded by it, on `device`. rows: pairs of a
    micro-batch. coalesce: reduce the gradients of several micro-batches at once. logged: its figures are written down.

    alpha: the teacher's share of the similarity. soft_weight: the momentum model's share of the targets of ITC and MLM.
    statistics: figures on mutual information are wanted.
    """

    number: int
    seed: int
    generator: torch.Generator
    device: torch.device
    rows: int
    coalesce: bool = False
    logged: bool = False
    alpha: float = 0.0
    soft_weight: float = 0.0
    statistics: bool = False

    def seed_of(self, micro_batch: int) -> int:
        """Return the seed of a micro-batch's random numbers, the same whenever it goes through the model."""
        return words(1, self.seed, micro_batch)[0] >> 1


@dataclass(frozen=True)
class FrozenModels:
    """Models that a step compares with and does not train. precision: of their products (`train.precision`)."""

    teacher: Teacher | None = None
    momentum: Momentum | None = None
    precision: str = "fp32"

    def teacher_features(self, batch: Batch) -> Features | None:
        """Return (b, d_t) unit features of images and captions, stored in the batch or computed; None without a
        teacher."""
        known = self.teacher or batch.teacher_features is not None
        return teacher_features(self.teacher, batch, self.precision) if known else None

    def targets(
        self, step: Step, teacher: Features | None, momentum: Features | None, tokens: Tensor | None
    ) -> Targets:
        """Combine these models' outputs and the queue to a step's targets; tokens: logits of the masked tokens."""
        keys = None
        if self.momentum and momentum:
            from sacl_ds.losses.queue import Keys

            queue, regulated = self.momentum.queue, self.momentum.settings.regulate_queue
            old = queue["image"], queue["text"], queue["teacher_image"], queue["teacher_text"], queue["ids"]
            keys = Keys(*momentum, *old, regulated)
        alpha = step.alpha if teacher else 0.0
        return Targets(teacher, alpha, step.generator, step.statistics, True, keys, step.soft_weight, tokens)


ALONE = FrozenModels()


def contrastive_step(
    engine: DeepSpeedEngine, batch: Batch, step: Step, frozen: FrozenModels = ALONE
) -> tuple[Losses, Features, Targets]:
    """Run forward and backward of the engine's PretrainObjective.

    Returns losses, (b, d) features of this rank's images and texts, detached, and the targets they met. batch: this
    rank's, on the host where it takes several micro-batches.
    """
    if len(batch) > step.rows:
        return _gradient_cache_step(engine, batch, step, frozen)
    objective: PretrainObjective = engine.module
    teacher, momentum, token_logits = frozen.teacher_features(batch), None, None
    if frozen.momentum:
        wants_tokens = step.soft_weight > 0 and objective.settings.mlm_weight > 0
        momentum, token_logits = frozen.momentum.outputs(batch, wants_tokens, frozen.precision)
    targets = frozen.targets(step, teacher, momentum, token_logits)
    losses = engine(batch, targets)
    engine.backward(losses["loss"])
    features = losses.pop("image"), losses.pop("text")
    return {name: value.detach() for name, value in losses.items()}, features, targets


def _gradient_cache_step(
    engine: DeepSpeedEngine, batch: Batch, step: Step, frozen: FrozenModels
) -> tuple[Losses, Features, Targets]:
    """Run `contrastive_step` in micro-batches, with a gradient cache."""
    objective: PretrainObjective = engine.module
    settings, parts, averaged = objective.settings, batch.parts(step.rows), frozen.momentum
    wants_tokens = step.soft_weight > 0 and settings.mlm_weight > 0

    # 1. every micro-batch without graph: its features, and what the frozen models say of it
    seen, of_teacher, of_momentum = [], [], []
    with torch.no_grad():
        for number, part in enumerate(ahead(parts, step.device)):
            torch.manual_seed(step.seed_of(number))
            seen.append(engine(part, None) | {"pair_ids": part.pair_ids})
            forget_order(engine)
            of_teacher.append(frozen.teacher_features(part))
            of_momentum.append(averaged.outputs(part, False, frozen.precision)[0] if averaged else None)
    targets = frozen.targets(step, _joined(of_teacher), _joined(of_momentum), None)

    # 2. the contrastive loss of all pairs of all ranks, and its gradient in each feature and in the logit scale
    whole = [torch.cat([each[name] for each in seen]) for name in ("image", "text", "pair_ids")]
    image, text, scale = (x.detach().requires_grad_() for x in (*whole[:2], seen[-1]["logit_scale"]))
    contrastive = objective.contrastive(image, text, scale, whole[2], targets)
    d_image, d_text, d_scale = torch.autograd.grad(settings.contrastive_weight * contrastive.loss, [image, text, scale])
    image, text, scale = image.detach(), text.detach(), scale.detach()
    losses = {"itc": contrastive.loss.detach(), **(contrastive.statistics or {}), "logit_scale": scale}

    # 3. ITM's negatives within each micro-batch, and how many pairings and tokens the means of ITM and MLM run over
    negatives: list[HardNegatives | None] = [None] * len(parts)
    if settings.matching_weight:
        weighting = objective.weighting(targets, contrastive.least_kept)
        for number, each in enumerate(seen):
            mine = weighting.part(slice(number * step.rows, (number + 1) * step.rows)) if weighting else None
            negatives[number] = objective.hard_negatives(
                each["image"], each["text"], scale, each["pair_ids"], mine, step.generator
            )
    tokens = sum(int((part.mlm_labels != IGNORED).sum()) for part in parts if part.mlm_labels is not None)
    pairings = sum((each.valid.sum().double() for each in negatives if each), scale.new_zeros((), dtype=torch.float64))
    tokens, pairings = sum_over_ranks(torch.stack([torch.full_like(pairings, tokens), pairings]))

    # 4. every micro-batch again, with the random numbers of the first time
    d_scale = d_scale / len(parts)  # in every graph: some stages of ZeRO want all parameters in all backward passes
    gradients = zip(d_image.split(step.rows), d_text.split(step.rows), strict=True)
    with _reduction(engine, step.coalesce):
        for number, (part, into, drawn) in enumerate(zip(ahead(parts, step.device), gradients, negatives, strict=True)):
            believed = averaged.outputs(part, True, frozen.precision)[1] if averaged and wants_tokens else None
            torch.manual_seed(step.seed_of(number))  # as in the first pass, right before the engine's
            engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            cached = CachedGradients(*into, d_scale, drawn, pairings, tokens, step.soft_weight, believed)
            out = engine(part, cached)
            engine.backward(out.pop("loss"))
            _add(losses, out)
    losses["loss"] = objective.weighted(losses)
    return losses, (image, text), targets


def summed_step(engine: DeepSpeedEngine, batch: Loadable, step: Step) -> Losses:
    """Run forward and backward of an objective whose losses are means over its rows; returns those of all rows.

    batch: this rank's, on the host where it takes several micro-batches.
    """
    several = len(batch) > step.rows
    parts = batch.parts(step.rows) if several else [batch]
    share = 1 / len(parts)  # all are equally long
    losses: Losses = {}
    with _reduction(engine, step.coalesce and several):
        for number, part in enumerate(ahead(parts, step.device) if several else parts):
            engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            out = {name: share * value for name, value in engine(part).items()}
            engine.backward(out["loss"])
            _add(losses, out)
    return losses


@torch.no_grad()
def rows_not_finite(engine: DeepSpeedEngine, batch: Batch, step: Step) -> Tensor:
    """Find pairs of a PretrainObjective's batch whose own features are not finite, (b,) bool; every rank calls it."""
    found = []
    for part in ahead(batch.parts(step.rows), step.device) if len(batch) > step.rows else [batch]:
        out = engine(part, None)
        forget_order(engine)
        found.append(~(out["image"].isfinite().all(1) & out["text"].isfinite().all(1)))
    return torch.cat(found)


def _joined(parts: Sequence[Features | None]) -> Features | None:
    """Concatenate the features of all micro-batches; None where there are none."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    image, text = (torch.cat(rows) for rows in zip(*known, strict=True))
    return image, text


def _add(sums: Losses, more: Losses) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


@contextmanager
def _reduction(engine: DeepSpeedEngine, once: bool) -> Iterator[None]:
    """Set how gradients are reduced in the backward passes of this block.

    once: gradients stay whole on each rank and are reduced at the end. Stage 0 does so in any case.
    """
    if once and engine.zero_optimization_stage():
        with engine.coalesce_grad_reduction():
            yield
    else:
        yield
