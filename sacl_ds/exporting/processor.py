"""Canonical view as an image processor of transformers."""

from __future__ import annotations

from transformers import PerceiverImageProcessor

from sacl_ds.config import ModelConfig


def image_processor(config: ModelConfig) -> PerceiverImageProcessor:
    """Make the image processor, Perceiver's: it crops the middle square before it resizes, as `CanonicalView` does.

    CLIP's and Chinese CLIP's resize first and crop whole pixels, which moves a picture by up to half a pixel.
    """
    square = {"height": config.image_size, "width": config.image_size}
    return PerceiverImageProcessor(
        size=square,
        crop_size=square,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        do_convert_rgb=True,
    )
