"""Pictures to uint8 tensors of one size. Normalisation happens on the device, in the image encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sacl_ds.data.draws import fraction, words

RATIO = (3 / 4, 4 / 3)  # of a random crop's sides, as in torchvision's RandomResizedCrop


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class CanonicalView:
    """Resize the shorter side (bicubic), centre crop: what evaluation and the teacher always see."""

    size: int

    def __call__(self, image: Image.Image, entropy: tuple[int, ...]) -> Tensor:
        """(3, size, size) uint8; `entropy` is not used."""
        width, height = image.size
        if (width, height) != (self.size, self.size):
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        return _tensor(image)


@dataclass(frozen=True)
class TrainView:
    """Random resized crop, and mirroring where asked for; drawn from `entropy` alone."""

    size: int
    scale: tuple[float, float]
    flip: bool

    def __call__(self, image: Image.Image, entropy: tuple[int, ...]) -> Tensor:
        """(3, size, size) uint8."""
        drawn = words(5, *entropy)
        share, stretch, across, down = (fraction(word) for word in drawn[:4])
        width, height = image.size
        area = width * height * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
        low, high = (math.log(bound) for bound in RATIO)
        ratio = math.exp(low + stretch * (high - low))
        crop_width, crop_height = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
        left, top = across * (width - crop_width), down * (height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if self.flip and drawn[4] & 1:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _tensor(image)
