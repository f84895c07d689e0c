"""Losses. Needs torch and nothing else of this package but `sacl_ds.distributed`."""

from sacl_ds.losses.contrastive import ContrastiveOutput, similarity_regulated_loss
from sacl_ds.losses.keys import Keys
from sacl_ds.losses.masked_language import masked_language_loss
from sacl_ds.losses.matching import HardNegatives, hard_negatives, matching_loss
from sacl_ds.losses.reduction import global_mean
from sacl_ds.losses.reference import regulation_weights
from sacl_ds.losses.regulation import Regulation

__all__ = [
    "ContrastiveOutput",
    "HardNegatives",
    "Keys",
    "Regulation",
    "global_mean",
    "hard_negatives",
    "masked_language_loss",
    "matching_loss",
    "regulation_weights",
    "similarity_regulated_loss",
]
