"""The regulated loss in a transformers Trainer, for CLIPModel and models like it.

    trainer = RegulatedTrainer(model=CLIPModel.from_pretrained(...), args=..., train_dataset=..., sharpness=3.0)
    trainer.train()

The loss gathers over ranks by itself, which CLIPModel's own (return_loss=True) does not: its negatives are one GPU's.
"""

from torch import Tensor
from transformers import Trainer

from sacl_ds.losses import SimilarityRegulatedLoss


class RegulatedTrainer(Trainer):
    def __init__(self, *args, sharpness: float = 3.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.regulated_loss = SimilarityRegulatedLoss(sharpness=sharpness)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch: Tensor | None = None):
        inputs = {name: value for name, value in inputs.items() if name != "return_loss"}
        outputs = model(**inputs)  # image_embeds and text_embeds come L2-normalised
        logit_scale = self.accelerator.unwrap_model(model).logit_scale.exp()
        loss = self.regulated_loss(outputs.image_embeds, outputs.text_embeds, logit_scale)
        return (loss, outputs) if return_outputs else loss
