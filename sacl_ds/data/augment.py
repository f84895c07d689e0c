"""Augmentation for fine-tuning: RandAugment (Cubuk et al., CVPR workshops 2020) with the settings of ALBEF.

ALBEF fine-tunes with 2 operations of magnitude 7, drawn with repeats from the ten of `OPERATIONS`, each carried out
half of the time; shears are about the top left corner, and what lies outside of the picture is grey. Two scales are
made to mean the same everywhere: brightness and sharpness change by 5 % a step either way (ALBEF's own table gives 1.36
at 7, as here, but makes a picture all but black at 0, and changes nothing at 5), and a picture is moved by so many
pixels where it is 384 wide, the size that ALBEF fine-tunes at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from sacl_ds.data.draws import words
from sacl_ds.data.pictures import Picture
from sacl_ds.data.transforms import CanonicalView, TrainView

GREATEST = 10  # magnitude
_FILL = [128.0, 128.0, 128.0]
_SHEAR, _DEGREES, _FACTOR, _SHIFT = 0.03, 3.0, 0.05, 1 / 384  # a step of magnitude
_SIDED = re.compile(r"(?<![^\W\d_])(?:left|right)", re.IGNORECASE)  # not in bright, upright, cleft
_OPERATIONS, _MIRROR = 1, 2  # purpose of a draw; a view's crop is drawn from the bare entropy

Operation = Callable[[Tensor, float], Tensor]


def _moved(pixels: Tensor, across: float = 0.0, down: float = 0.0) -> Tensor:
    """Translate an image right and down by these shares of its width and height, rounded to whole pixels."""
    shift = [round(across * pixels.shape[2]), round(down * pixels.shape[1])]
    return functional.affine(pixels, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0], fill=_FILL)


def _sheared(pixels: Tensor, across: float = 0.0, down: float = 0.0) -> Tensor:
    """Shear an image: the point (x, y), from the top left corner, moves to (x + across * y, y + down * x)."""
    shear = [-math.degrees(math.atan(share)) for share in (across, down)]  # torchvision's angles turn the other way
    return functional.affine(
        pixels, 0.0, [0, 0], 1.0, shear, interpolation=InterpolationMode.BILINEAR, fill=_FILL, center=[0.0, 0.0]
    )


def _turned(pixels: Tensor, degrees: float) -> Tensor:
    """Rotate an image about its centre, counter-clockwise."""
    return functional.rotate(pixels, degrees, interpolation=InterpolationMode.BILINEAR, fill=_FILL)


# each takes (3, H, W) uint8 and a signed magnitude, and gives the same shape and type
OPERATIONS: dict[str, Operation] = {
    "identity": lambda pixels, step: pixels,
    "autocontrast": lambda pixels, step: functional.autocontrast(pixels),
    "equalize": lambda pixels, step: functional.equalize(pixels),
    "brightness": lambda pixels, step: functional.adjust_brightness(pixels, 1 + _FACTOR * step),
    "sharpness": lambda pixels, step: functional.adjust_sharpness(pixels, 1 + _FACTOR * step),
    "shear_x": lambda pixels, step: _sheared(pixels, across=_SHEAR * step),
    "shear_y": lambda pixels, step: _sheared(pixels, down=_SHEAR * step),
    "translate_x": lambda pixels, step: _moved(pixels, across=_SHIFT * step),
    "translate_y": lambda pixels, step: _moved(pixels, down=_SHIFT * step),
    "rotate": lambda pixels, step: _turned(pixels, _DEGREES * step),
}


def drawn_operations(count: int, magnitude: int, entropy: tuple[int, ...]) -> list[tuple[str, int]]:
    """(name, signed magnitude) of those of `count` drawn operations that are carried out, in order."""
    names = tuple(OPERATIONS)
    drawn = words(2 * count, *entropy, _OPERATIONS) if count else ()
    return [
        (names[name % len(names)], magnitude if chance & 2 else -magnitude)
        for name, chance in zip(drawn[::2], drawn[1::2], strict=True)
        if chance & 1
    ]


@dataclass(frozen=True)
class FinetuneView:
    """Random resized crop, mirroring where asked for, then `operations` of `OPERATIONS`; drawn from `entropy` alone.

    scale: share of the picture that a crop keeps; None: always the square in the middle.
    magnitude: how strong, 0 to 10; at 0 only autocontrast and equalize still change anything.
    """

    size: int
    scale: tuple[float, float] | None
    flip: bool
    operations: int = 2
    magnitude: int = 7

    def __post_init__(self) -> None:
        if self.operations < 0 or not 0 <= self.magnitude <= GREATEST:
            raise ValueError(
                f"operations={self.operations}, magnitude={self.magnitude}: at least 0, and 0 to {GREATEST}"
            )

    def __call__(self, picture: Picture, entropy: tuple[int, ...]) -> Tensor:
        """Transform a picture to (3, size, size) uint8. Raises BadImage."""
        pixels = self._seen(picture, entropy)
        for name, step in drawn_operations(self.operations, self.magnitude, entropy):
            pixels = OPERATIONS[name](pixels, step)
        return pixels

    def _seen(self, picture: Picture, entropy: tuple[int, ...]) -> Tensor:
        if self.scale is not None:
            return TrainView(self.size, self.scale, self.flip)(picture, entropy)
        pixels = CanonicalView(self.size)(picture, entropy)
        return pixels.flip(2) if self.flip and words(1, *entropy, _MIRROR)[0] & 1 else pixels

    def for_text(self, text: str) -> FinetuneView:
        """Return this transform for a picture with this text: without mirroring where it could make the text false.

        Mirroring is left out where a word begins with left or right, in any case: leftmost, left-hand. That leftovers
        may not be mirrored either does no harm.
        """
        return replace(self, flip=False) if self.flip and _SIDED.search(text) else self
