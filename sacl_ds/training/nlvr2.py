"""Objective of NLVR2's fine-tuning."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sacl_ds.data.downstream.nlvr2 import StatementBatch
from sacl_ds.model.nlvr2 import Nlvr2Model


class Nlvr2Objective(nn.Module):
    """Cross-entropy of each statement's truth."""

    def __init__(self, model: Nlvr2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: StatementBatch) -> dict[str, Tensor]:
        """Compute 0-dim float32 `loss`, the mean over the rank's statements, and `accuracy`, without gradient.

        With equally many statements a rank, the mean of either over ranks is that of the whole batch, and so are the
        gradients.
        """
        logits = self.model(batch.left, batch.right, batch.input_ids, batch.attention_mask)
        right = logits.detach().argmax(1) == batch.labels
        return {"loss": cross_entropy(logits, batch.labels), "accuracy": right.float().mean()}
