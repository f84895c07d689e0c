"""The regulated loss in place of open_clip's ClipLoss.

In open_clip's training script, `create_loss` returns the loss that is called with the model's output; return this one:

    loss = RegulatedClipLoss(sharpness=3.0)
    losses = loss(**model(images, texts), output_dict=True)          # as ClipLoss is called there

It gathers by itself: neither --local-loss nor --gather-with-grad is needed, and the gradients that
DistributedDataParallel averages are those of one process with the whole batch.
"""

import torch
from torch import Tensor

from sacl_ds.losses import similarity_regulated_loss


class RegulatedClipLoss(torch.nn.Module):
    def __init__(self, sharpness: float = 3.0) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False):
        out = similarity_regulated_loss(image_features, text_features, logit_scale, sharpness=self.sharpness)
        return {"contrastive_loss": out.loss} if output_dict else out.loss
