"""Crops of pictures. Normalisation happens on the device, in the image encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sacl_ds.data.draws import fraction, words
from sacl_ds.data.pictures import Picture

RATIO = (3 / 4, 4 / 3)  # of a random crop's sides, as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class CanonicalView:
    """Central square crop: what evaluation and the teacher always see."""

    size: int

    def __call__(self, picture: Picture, entropy: tuple[int, ...]) -> Tensor:
        """Transform a picture to (3, size, size) uint8; `entropy` is not used. Raises BadImage."""
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return picture.resized((left, top, left + side, top + side), self.size)


@dataclass(frozen=True)
class TrainView:
    """Random resized crop, and mirroring where asked for; drawn from `entropy` alone."""

    size: int
    scale: tuple[float, float]
    flip: bool

    def __call__(self, picture: Picture, entropy: tuple[int, ...]) -> Tensor:
        """Transform a picture to (3, size, size) uint8. Raises BadImage."""
        drawn = words(5, *entropy)
        share, stretch, across, down = (fraction(word) for word in drawn[:4])
        width, height = picture.size
        area = width * height * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
        low, high = (math.log(bound) for bound in RATIO)
        ratio = math.exp(low + stretch * (high - low))
        crop_width = min(width, max(1, round(math.sqrt(area * ratio))))
        crop_height = min(height, max(1, round(math.sqrt(area / ratio))))
        left, top = round(across * (width - crop_width)), round(down * (height - crop_height))
        pixels = picture.resized((left, top, left + crop_width, top + crop_height), self.size)
        return pixels.flip(2) if self.flip and drawn[4] & 1 else pixels
