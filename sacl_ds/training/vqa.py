"""Objective of VQA's fine-tuning."""

from __future__ import annotations

from torch import Tensor, nn

from sacl_ds.data.downstream.question_batch import QuestionBatch
from sacl_ds.model.vqa import VqaModel


class VqaObjective(nn.Module):
    """Likelihood of people's answers, each by its share of them (ALBEF's, without its momentum model)."""

    def __init__(self, model: VqaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: QuestionBatch) -> dict[str, Tensor]:
        """Compute 0-dim `loss`, to be minimised, and `answer_loss`, the same without gradient.

        The sum over answers of weight times -log p, by the number of questions. That number is equal on all ranks, so
        the mean over ranks is the value for the whole global batch, and so are the gradients.
        """
        states = self.model.encode_question(batch.images, batch.input_ids, batch.attention_mask)
        losses = self.model.answer_losses(
            states, batch.attention_mask, batch.answer_ids, batch.answer_mask, batch.answer_question
        )
        loss = (batch.answer_weight.to(losses.dtype) * losses).sum() / len(batch)
        return {"loss": loss, "answer_loss": loss.detach()}
