"""What the momentum model and its queue give a step to compare with and to aim at."""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import Batch
from sacl_ds.losses import Keys
from sacl_ds.model.momentum import Momentum
from sacl_ds.model.precision import autocast
from sacl_ds.training.objectives import Features, MomentumTargets
from sacl_ds.training.passes import predicted_tokens


@torch.no_grad()
def momentum_outputs(momentum: Momentum, batch: Batch, run: RunConfig, tokens: bool) -> tuple[Features, Tensor | None]:
    """What the momentum model makes of a batch; nothing of it changes. Features, and, with tokens, (n, vocabulary)
    logits of the masked tokens, whose images are as the momentum model sees them."""
    model = momentum.average
    with autocast(batch.images.device, run.train.precision):
        text_states, text = model.encode_text(batch.input_ids, batch.attention_mask, batch.token_places)
        image_states, image = model.encode_image(batch.images, text_states[:, 0] if model.captions_choose else None)
        return (image, text), predicted_tokens(model, image_states, batch) if tokens else None


def momentum_targets(
    momentum: Momentum, run: RunConfig, features: Features, soft_weight: float, token_logits: Tensor | None
) -> MomentumTargets:
    """Of one step, from `momentum_outputs` of its batch."""
    queue = momentum.queue
    keys = Keys(
        *features,
        queue["image"],
        queue["text"],
        queue["teacher_image"],
        queue["teacher_text"],
        queue["ids"],
        run.momentum.regulate_queue,
    )
    return MomentumTargets(keys, soft_weight, token_logits)
