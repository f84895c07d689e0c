"""Losses. Needs torch and nothing else of this package but `sacl_ds.distributed`."""

from sacl_ds.losses.contrastive import ContrastiveOutput, regulation_weights, similarity_regulated_loss
from sacl_ds.losses.masked_language import masked_language_loss
from sacl_ds.losses.matching import matching_loss, sample_negatives

__all__ = [
    "ContrastiveOutput",
    "masked_language_loss",
    "matching_loss",
    "regulation_weights",
    "sample_negatives",
    "similarity_regulated_loss",
]
