"""Losses. Needs torch and nothing else of this package but `sacl_ds.distributed`."""

from typing import TYPE_CHECKING, Any

from sacl_ds.losses.fusion import (
    HardNegatives,
    Weighting,
    global_mean,
    hard_negatives,
    masked_language_loss,
    matching_loss,
)
from sacl_ds.losses.regulated import (
    ContrastiveOutput,
    Regulation,
    SimilarityRegulatedLoss,
    regulation_weights,
    similarity_regulated_loss,
)

if TYPE_CHECKING:
    from sacl_ds.losses.queue import Keys

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


def __getattr__(name: str) -> Any:
    """Load `Keys` only when it is asked for: a loss without a momentum model does not need it."""
    if name == "Keys":
        from sacl_ds.losses.queue import Keys

        return Keys
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
