"""What the momentum model and its queue give a step to compare with and to aim at."""

from __future__ import annotations

import torch

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import Batch
from sacl_ds.losses import Keys
from sacl_ds.model.momentum import Momentum
from sacl_ds.training.objectives import MomentumTargets, predicted_tokens


@torch.no_grad()
def momentum_targets(momentum: Momentum, batch: Batch, run: RunConfig, soft_weight: float) -> MomentumTargets:
    """Of one step; nothing of `momentum` changes.

    The masked captions' images are as the momentum model sees them. Where soft_weight is 0 their pass is left out.
    """
    model, queue = momentum.average, momentum.queue
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=run.train.precision == "bf16"):
        text_states, text = model.encode_text(batch.input_ids, batch.attention_mask, batch.token_places)
        image_states, image = model.encode_image(batch.images, text_states[:, 0] if model.captions_choose else None)
        soft = soft_weight > 0 and run.loss.mlm_weight > 0
        token_logits = predicted_tokens(model, image_states, batch) if soft else None
    keys = Keys(
        image,
        text,
        queue["image"],
        queue["text"],
        queue["teacher_image"],
        queue["teacher_text"],
        queue["ids"],
        run.momentum.regulate_queue,
    )
    return MomentumTargets(keys, soft_weight, token_logits)
