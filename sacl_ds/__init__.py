"""sacl_ds: similarity-regulated contrastive vision-language pre-training on DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from sacl_ds.inference import PairModel

__version__ = "0.1.0"


def load(
    folder: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> PairModel:
    """Load the model of a finished run, or of an export with --to safetensors, for features and matches.

    device: default a GPU where there is one. dtype: of weights and products: float32 (default), bfloat16 or float16.
    Raises sacl_ds.errors.UserError.
    """
    from sacl_ds.inference import load_pair_model  # `import sacl_ds` alone brings no torch

    return load_pair_model(folder, device, dtype)
