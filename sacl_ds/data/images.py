"""Encoded images: decodability and size."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: JPEG as some cameras write it
# of all that Pillow reads: for EPS it would start Ghostscript, and most others are seldom looked at by anyone
_READ = ("JPEG", "PNG", "WEBP")
_OTHERS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%!PS": "EPS", b"<svg": "SVG"}


def open_image(data: bytes) -> Image.Image:
    """Open an encoded JPEG, PNG or WebP, told by its content; pixels are decoded when they are asked for.

    Raises BadImage for other formats, and what Pillow raises for damaged ones and for far more pixels than memory holds
    (twice Image.MAX_IMAGE_PIXELS).
    """
    other = next((name for start, name in _OTHERS.items() if data.startswith(start)), None)
    if other:
        raise BadImage(f"{other}, where shards hold JPEG, PNG or WebP")
    return Image.open(io.BytesIO(data), formats=_READ)


class BadImage(ValueError):
    """Encoded bytes that training could not use; the message says why."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    extension: str  # by content, whatever the file was called
    width: int  # pixels
    height: int


def examine(data: bytes) -> ImageFacts:
    """Decode an image to the end. Raises BadImage where it is damaged, cut short, or no JPEG, PNG or WebP.

    Not `verify()`: for JPEG that looks at the header only and lets a file cut in half pass. JPEGs are decoded at an
    eighth of their size, which still reads every bit of them and takes about half the time.
    """
    try:
        image = open_image(data)
        width, height = image.size
        image.draft(None, (1, 1))
        image.load()
    except Exception as error:  # Pillow's readers raise a dozen types for damaged files
        raise bad_image(error) from None
    return ImageFacts(_EXTENSIONS[str(image.format)], width, height)


def bad_image(error: Exception) -> BadImage:
    """Convert an image reader's exception to BadImage."""
    return BadImage("not an image" if "BytesIO" in str(error) else str(error).replace("\n", " "))
