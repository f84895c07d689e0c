"""Pictures to uint8 tensors: decoded when a view asks, cropped before they are resized, no larger than need be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sacl_ds.data.images import bad_image, open_image

_ORIENTATION = 274  # EXIF
_SPARE = 2  # a picture is decoded at 1/2, 1/4 or 1/8 where that leaves so many times the pixels asked for
_START, _SCAN, _APP1 = b"\xff\xd8", b"\xda", 0xE1  # JPEG markers; in APP1 lie EXIF and XMP, which can turn it
_PAPER = (255, 255, 255)  # under transparent pixels

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class Picture:
    """An encoded image, or pixels. EXIF orientation is applied, transparent pixels lie on white."""

    size: tuple[int, int]  # pixels: width, height

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """Of an image of Pillow's, opened already. Raises BadImage where it is damaged."""
        try:
            turned = ImageOps.exif_transpose(image)
            return cls(_tensor(_rgb(image if turned is None else turned)))
        except Exception as error:  # as below
            raise bad_image(error) from None

    def __init__(self, data: bytes | Tensor) -> None:
        """data: a JPEG, PNG or WebP, or (3, H, W) uint8. Raises BadImage where it is no image."""
        self._data, self._jpeg, self._plain, self._turned = data, False, False, False
        self._decoded: dict[int, Tensor] = {}  # by 1 / scale
        if isinstance(data, Tensor):
            self.size = data.shape[2], data.shape[1]
            self._decoded[1] = data
            return
        if size := _size_of_plain_jpeg(data):
            self.size, self._jpeg, self._plain = size, True, True
            return
        try:
            opened = open_image(data)
            orientation = opened.getexif().get(_ORIENTATION, 1)
            width, height = opened.size
        except Exception as error:  # Pillow's readers raise a dozen types for damaged files
            raise bad_image(error) from None
        # whatever else stands there says nothing
        self._turned = isinstance(orientation, int) and 2 <= orientation <= 8
        self.size = (
            (height, width) if self._turned and orientation >= 5 else (width, height)
        )  # from 5 on: quarter turns
        self._jpeg = opened.format in ("JPEG", "MPO")
        self._plain = self._jpeg and opened.mode in ("RGB", "L") and not self._turned

    def pixels(self) -> Tensor:
        """(3, H, W) uint8, the whole picture. Raises BadImage where it is damaged."""
        return self._at(1)

    def resized(self, box: Box, size: int) -> Tensor:
        """(3, size, size) uint8: what lies in `box`, by bicubic interpolation with antialiasing, as Pillow has it.

        Equal to Pillow's within 2 of 255 (one value in 10,000 by more than 1) where the box is less than 2 * size wide
        or high; a larger one is decoded at a fraction of its size first. Raises BadImage where it is damaged.
        """
        left, top, right, bottom = box
        least = min(right - left, bottom - top)
        divisor = max((d for d in (1, 2, 4, 8) if self._jpeg and least >= d * _SPARE * size), default=1)
        pixels = self._at(divisor)
        if divisor > 1:
            left, top, right, bottom = (round(edge / divisor) for edge in box)
        part = pixels[:, top:bottom, left:right]
        if part.shape[1:] == (size, size):
            return part
        # channels last in memory, for which interpolation has a faster path; NumPy copies rows as a whole
        part = torch.from_numpy(np.ascontiguousarray(part.permute(1, 2, 0).numpy()))[None].permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]

    def _at(self, divisor: int) -> Tensor:
        """Pixels at 1 / divisor of the size. Which one a view asks for depends on nothing else that was asked for."""
        if divisor not in self._decoded:
            self._decoded[divisor] = self._decode(divisor)
        return self._decoded[divisor]

    def _decode(self, divisor: int) -> Tensor:
        assert isinstance(self._data, bytes)
        if self._plain:
            width, height = (-(-side // divisor) for side in self.size)
            try:
                pixels = simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width)
                return torch.from_numpy(pixels).permute(2, 0, 1)
            except ValueError:
                pass  # Pillow decides whether it is damaged, here as in `examine`
        try:
            image = open_image(self._data)
            if divisor > 1:
                width, height = image.size
                image.draft("RGB", (width // divisor, height // divisor))
            image.load()
            return _tensor(_rgb(ImageOps.exif_transpose(image) if self._turned else image))
        except Exception as error:  # as above
            raise bad_image(error) from None


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG in grey or YCbCr that is not turned; None for all else, of which Pillow knows more."""
    if data[:2] != _START or _APP1 in _markers(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    modest = width * height <= (Image.MAX_IMAGE_PIXELS or math.inf)
    return (width, height) if modest and colours in ("YCbCr", "Gray") else None


def _markers(data: bytes) -> Iterator[int]:
    """Of a JPEG's segments, up to its pixels."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != _SCAN:
        yield data[place + 1] if place + 1 < len(data) else 0
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # Pillow would cut, not scale, what is above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*_PAPER, 255))
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
