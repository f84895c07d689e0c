"""A step in several micro-batches, with the gradients of one pass over all of them, at the memory of one.

Where each row has a loss of its own, theirs add up. A contrastive loss needs all features at once (gradient caching,
Gao et al. 2021, arXiv 2101.06983):

1. every micro-batch goes through the model without graph, and leaves its features;
2. these meet in the loss, on all ranks, which gives its gradient in each feature and in the temperature;
3. every micro-batch goes through again, with the random numbers of the first time: what it minimises is the product of
   its features with that gradient, and its share of ITM and MLM, whose means are over the whole global batch.

ITM's negatives come from the micro-batch, as they come from the rank's batch where there is one pass alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sacl_ds.data.ahead import ahead
from sacl_ds.data.batch import Batch
from sacl_ds.data.loader import Loadable
from sacl_ds.data.text import IGNORED
from sacl_ds.distributed import sum_over_ranks
from sacl_ds.ds_config import zero_stage
from sacl_ds.losses import HardNegatives
from sacl_ds.training.engine import forget_order
from sacl_ds.training.objectives import Features, MicroTargets, PretrainObjective, Targets
from sacl_ds.training.step import Step


class Beside(NamedTuple):
    """What models that are not trained make of a batch, without gradient.

    The teacher's features, the momentum model's, and the latter's (n, vocabulary) logits of the masked tokens; None
    where there is no such model, or no use for it.
    """

    teacher: Features | None = None
    momentum: Features | None = None
    token_logits: Tensor | None = None


class Aims(Protocol):
    """Where the targets of a step come from."""

    def beside(self, batch: Batch, features: bool, tokens: bool) -> Beside:
        """Of a batch or a micro-batch on the device; features, tokens: whether these are wanted."""

    def targets(self, beside: Beside) -> Targets:
        """Of the whole step, which may hold no token_logits."""


@dataclass(frozen=True)
class Met:
    """What a contrastive step leaves. losses: 0-dim, detached. features: (b, d) unit features of this rank's images and
    texts, detached; None unless targets.features. targets: what they met."""

    losses: dict[str, Tensor]
    features: Features | None
    targets: Targets


def contrastive_step(
    engine: DeepSpeedEngine,
    batch: Batch,
    step: Step,
    aims: Aims,
) -> Met:
    """Forward and backward of the engine's PretrainObjective; the engine's own step is still to be made.

    batch: this rank's, on the host where it takes several micro-batches.
    """
    if len(batch) <= step.rows:
        targets = aims.targets(aims.beside(batch, features=True, tokens=True))
        made = engine(batch, targets)
        losses, features = made if targets.features else (made, None)
        engine.backward(losses["loss"])
        return Met({name: value.detach() for name, value in losses.items()}, features, targets)
    objective: PretrainObjective = engine.module
    parts = batch.parts(step.rows)
    looked = _look(engine, parts, step, aims)
    targets = aims.targets(looked.beside)
    losses, wanted = _meet(objective, looked, parts, targets)
    with _reduction(engine, step.coalesce):
        for number, part in enumerate(ahead(parts, step.device)):
            logits = aims.beside(part, features=False, tokens=True).token_logits
            torch.manual_seed(step.seed_of(number))  # as in the first pass, right before the engine's
            engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            made = engine(part, replace(wanted[number], token_logits=logits))
            engine.backward(made.pop("loss"))
            _add(losses, made)
    losses["loss"] = objective.weighted(losses)
    return Met(losses, (looked.image, looked.text) if targets.features else None, targets)


def summed_step(engine: DeepSpeedEngine, batch: Loadable, step: Step) -> dict[str, Tensor]:
    """Forward and backward of an objective whose losses and figures are means over its rows; returns those of all rows.

    batch: this rank's, on the host where it takes several micro-batches.
    """
    several = len(batch) > step.rows
    parts = batch.parts(step.rows) if several else [batch]
    share = 1 / len(parts)  # all are equally long
    losses: dict[str, Tensor] = {}
    with _reduction(engine, step.coalesce and several):
        for number, part in enumerate(ahead(parts, step.device) if several else parts):
            engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            made = {name: share * value for name, value in engine(part).items()}
            engine.backward(made["loss"])
            _add(losses, made)
    return losses


class _Looked(NamedTuple):
    """This rank's pairs behind the first pass, detached. sizes: of the micro-batches."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    pair_ids: Tensor
    beside: Beside
    sizes: list[int]


@torch.no_grad()
def _look(engine: DeepSpeedEngine, parts: Sequence[Batch], step: Step, aims: Aims) -> _Looked:
    features: list[Features | None] = []
    others: list[Beside] = []
    ids: list[Tensor] = []
    logit_scale = None
    for number, part in enumerate(ahead(parts, step.device)):
        torch.manual_seed(step.seed_of(number))
        image, text, logit_scale = engine(part, None)
        forget_order(engine)
        features.append((image, text))
        others.append(aims.beside(part, features=True, tokens=False))
        ids.append(part.pair_ids)
    joined = _joined(features)
    assert joined is not None
    assert logit_scale is not None
    of_others = Beside(_joined([each.teacher for each in others]), _joined([each.momentum for each in others]))
    return _Looked(*joined, logit_scale, torch.cat(ids), of_others, [len(part) for part in parts])


def _joined(parts: Sequence[Features | None]) -> Features | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    image, text = (torch.cat(rows) for rows in zip(*known, strict=True))
    return image, text


def _meet(
    objective: PretrainObjective, looked: _Looked, parts: Sequence[Batch], targets: Targets
) -> tuple[dict[str, Tensor], list[MicroTargets]]:
    """The contrastive loss of all features, detached; and what each micro-batch takes from it into the second pass."""
    settings, sizes = objective.settings, looked.sizes
    image, text, scale = (x.detach().requires_grad_() for x in (looked.image, looked.text, looked.logit_scale))
    losses, least_kept = objective.contrastive(image, text, scale, looked.pair_ids, targets)
    loss = settings.contrastive_weight * losses["itc"]
    into_image, into_text, into_scale = torch.autograd.grad(loss, [image, text, scale])
    negatives: list[HardNegatives | None] = [None] * len(parts)
    if settings.matching_weight:
        weighting = objective.weighting(targets, least_kept)
        ends = list(itertools.accumulate(sizes))
        negatives = [
            objective.hard_negatives(
                looked.image[rows],
                looked.text[rows],
                looked.logit_scale,
                looked.pair_ids[rows],
                None if weighting is None else weighting.part(rows),
                targets.generator,
            )
            for rows in map(slice, [0, *ends], ends)
        ]
    words = sum(int((part.mlm_labels != IGNORED).sum()) for part in parts if part.mlm_labels is not None)
    mine = [torch.tensor(words, device=into_scale.device, dtype=torch.float64)]
    mine += [each.valid.sum().double() for each in negatives if each]
    total_words, total_pairings = sum_over_ranks(torch.stack([mine[0], sum(mine[1:], torch.zeros_like(mine[0]))]))
    soft_weight = targets.momentum.soft_weight if targets.momentum else 0.0
    gradients = zip(into_image.split(sizes), into_text.split(sizes), negatives, strict=True)
    # every micro-batch has the temperature in its graph: some stages of ZeRO want all parameters in all backward passes
    into_scale = into_scale / len(parts)
    return (
        {name: value.detach() for name, value in losses.items()} | {"logit_scale": looked.logit_scale},
        [
            MicroTargets(of_image, of_text, into_scale, drawn, total_pairings, total_words, soft_weight)
            for of_image, of_text, drawn in gradients
        ],
    )


def _add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


@contextmanager
def _reduction(engine: DeepSpeedEngine, once: bool) -> Iterator[None]:
    """Around the backward passes of a step. once: gradients stay whole on each rank and are reduced at the end.

    Stage 0 does so in any case.
    """
    if once and zero_stage(engine.config):
        with engine.coalesce_grad_reduction():
            yield
    else:
        yield
