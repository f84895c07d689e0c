"""The regulated loss in place of open_clip's ClipLoss.

In open_clip's training script, `create_loss` returns the loss that is called with the model's output; return this one:

    loss = RegulatedClipLoss(sharpness=3.0)
    losses = loss(**model(images, texts), output_dict=True)          # as ClipLoss is called there

It gathers by itself: neither --local-loss nor --gather-with-grad is needed, and the gradients that
DistributedDataParallel averages are those of one process with the whole batch.
"""

from torch import Tensor

from sacl_ds.losses import SimilarityRegulatedLoss


class RegulatedClipLoss(SimilarityRegulatedLoss):
    def __init__(self, sharpness: float = 3.0, **settings) -> None:
        super().__init__(sharpness=sharpness, **settings)

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False):
        loss = super().forward(image_features, text_features, logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss
