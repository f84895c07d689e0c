"""Decoding of pictures to uint8 tensors: on demand, cropped before they are resized, no larger than needed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sacl_ds.data.images import bad_image, open_image

_ORIENTATION = 274  # EXIF
_TURNS = frozenset(range(2, 9))  # whatever else stands there says nothing
_SPARE = 2  # a picture is decoded at 1/2, 1/4 or 1/8 where that leaves so many times the pixels asked for
_START, _SCAN = b"\xff\xd8", b"\xda"  # JPEG markers
# APP1, where EXIF and XMP lie, which can turn it; markers of no length; fill bytes
_ALONE = (b"", b"\x00", b"\x01", b"\xe1", b"\xff", *(bytes([marker]) for marker in range(0xD0, 0xDA)))
_PAPER = (255, 255, 255)  # under transparent pixels

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class Picture:
    """An encoded image, or pixels. EXIF orientation is applied, transparent pixels lie on white."""

    size: tuple[int, int]  # pixels: width, height

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """Decode an opened Pillow image. Raises BadImage where it is damaged."""
        try:
            clear = _clear_colour(image)
            turned = ImageOps.exif_transpose(image)
            assert turned is not None  # a copy at least
            return cls(_tensor(_rgb(turned, clear)))
        except Exception as error:  # as below
            raise bad_image(error) from None

    def __init__(self, data: bytes | Tensor) -> None:
        """Open an image. data: a JPEG, PNG or WebP, or (3, H, W) uint8. Raises BadImage where it is no image."""
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
            if opened.format == "PNG":
                opened.load()  # text may follow its pixels
            orientation = opened.getexif().get(_ORIENTATION, 1)
            width, height = opened.size
        except Exception as error:  # Pillow's readers raise a dozen types for damaged files
            raise bad_image(error) from None
        self._turned = orientation in _TURNS
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
        """Decode at 1 / divisor of the size. The divisor of a request does not depend on earlier requests."""
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
            clear = _clear_colour(image)
            image.load()
            turned = ImageOps.exif_transpose(image) if self._turned else image
            return _tensor(_rgb(turned or image, clear))
        except Exception as error:  # as above
            raise bad_image(error) from None


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of an unrotated JPEG in grey or YCbCr; None for all else, of which Pillow knows more."""
    if not _is_plain_jpeg(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    modest = width * height <= (Image.MAX_IMAGE_PIXELS or math.inf)
    return (width, height) if modest and colours in ("YCbCr", "Gray") else None


def _is_plain_jpeg(data: bytes) -> bool:
    """Return whether a JPEG's segments follow each other up to its pixels, with no APP1 among them."""
    place = 2
    while data[:2] == _START and data[place : place + 1] == b"\xff":
        marker = data[place + 1 : place + 2]
        if marker == _SCAN:
            return True
        if marker in _ALONE:
            return False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _clear_colour(image: Image.Image) -> Any:
    """Return the transparent colour of an image without alpha, or None.

    Call it before the pixels are decoded: PNG gives it in the file's own bits, of which Pillow makes 8.
    """
    clear = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    bits = tiles[0][3] if tiles and image.format == "PNG" else ""
    if bits in ("L;2", "L;4"):
        return clear * (85 if bits == "L;2" else 17) if isinstance(clear, int) else clear
    return tuple(value >> 8 for value in clear) if bits == "RGB;16B" and isinstance(clear, tuple) else clear


def _rgb(image: Image.Image, clear: Any) -> Image.Image:
    """Convert to RGB, transparent pixels on white. clear: from `_clear_colour`."""
    if image.mode.startswith("I;16"):  # Pillow would cut, not scale, what is above 255
        deep = np.asarray(image)
        grey = np.where(deep == clear, _PAPER[0], deep >> 8) if isinstance(clear, int) else deep >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if clear is not None:
        image.info["transparency"] = clear
    if clear is not None or not {"A", "a"}.isdisjoint(image.getbands()):
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*_PAPER, 255))
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
