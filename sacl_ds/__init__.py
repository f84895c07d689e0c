"""sacl_ds: similarity-regulated contrastive vision-language pre-training on DeepSpeed."""

__version__ = "0.1.0"
