"""Losses. Needs torch and nothing else of this package but `sacl_ds.distributed`."""

from sacl_ds.losses.fusion import (
    HardNegatives,
    Weighting,
    global_mean,
    hard_negatives,
    masked_language_loss,
    matching_loss,
)
from sacl_ds.losses.queue import Keys
from sacl_ds.losses.regulated import (
    ContrastiveOutput,
    Regulation,
    SimilarityRegulatedLoss,
    regulation_weights,
    similarity_regulated_loss,
)

__all__ = [
    "ContrastiveOutput",
    "HardNegatives",
    "Keys",
    "Regulation",
    "SimilarityRegulatedLoss",
    "Weighting",
    "global_mean",
    "hard_negatives",
    "masked_language_loss",
    "matching_loss",
    "regulation_weights",
    "similarity_regulated_loss",
]
