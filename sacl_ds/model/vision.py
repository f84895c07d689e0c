"""Image encoder: a timm vision transformer with a [CLS] token; uint8 pixels in, tokens out."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from sacl_ds.errors import UserError, cannot_load


class ImageEncoder(nn.Module):
    """(b, 3, H, W) uint8 -> (b, 1 + patches, width); token 0 is [CLS]. Pixels are normalised here, on the device."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        pretrained: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        try:
            self.vit = timm.create_model(
                name, pretrained=pretrained, img_size=image_size, num_classes=0, **(arguments or {})
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"model.image_encoder={name!r}: {error}") from error
        except OSError as error:  # what fetching weights raises
            raise cannot_load("model.image_encoder", name.removeprefix("local-dir:"), error) from None
        if getattr(self.vit, "num_prefix_tokens", 0) != 1 or not hasattr(self.vit, "forward_features"):
            raise UserError(f"model.image_encoder={name!r}: choose a timm vision transformer with one [CLS] token")
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.width: int = self.vit.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features((images - self.mean) / self.std)
