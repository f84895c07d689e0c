"""Pixels of every kind of picture, beside those of Pillow."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from sacl_ds.data.images import BadImage
from sacl_ds.data.pictures import Picture
from sacl_ds.data.transforms import CanonicalView, TrainView


def photograph(width: int, height: int) -> Image.Image:
    """Smooth shapes with edges and some noise."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / min(width, height)
    waves = [np.sin(9 * x + 5 * y * y + k) + 0.7 * np.sign(np.sin(23 * y - 11 * x + 2 * k)) for k in range(3)]
    pixels = 128 + 55 * np.stack(waves, -1) + draw.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy().astype(int)


def by_pillow(data: bytes, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize(
    ("size", "box", "to"),
    [((500, 375), (31, 20, 467, 340), 256), ((500, 375), (0, 0, 500, 375), 224), ((90, 70), (10, 0, 60, 70), 128)],
)
def test_resized_as_by_pillow(kind: str, size: tuple[int, int], box: tuple[int, int, int, int], to: int) -> None:
    """Within 2 of 255, and nearly all within 1."""
    data = encoded(photograph(*size), kind, quality=90)
    found = array(Picture(data).resized(box, to))
    assert found.shape == (to, to, 3)
    difference = np.abs(found - by_pillow(data, box, to))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-4


@pytest.mark.parametrize(
    ("size", "to", "divisor"), [((1100, 1300), 256, 2), ((1074, 1150), 128, 4), ((2100, 2150), 128, 8)]
)
def test_large_ones_are_decoded_small(size: tuple[int, int], to: int, divisor: int) -> None:
    """At a half, a quarter, an eighth: close to the picture that is decoded whole, and far fewer pixels."""
    data = encoded(photograph(*size), "jpeg", quality=90)
    box = (7, 13, size[0] - 15, size[1] - 30)
    picture = Picture(data)
    difference = np.abs(array(picture.resized(box, to)) - by_pillow(data, box, to))
    assert difference.mean() < 1.5
    assert np.quantile(difference, 0.99) < 16
    assert set(picture._decoded) == {divisor}


def test_what_is_asked_first_does_not_matter() -> None:
    """A teacher that looks after a crop sees what a teacher sees that looks alone."""
    data = encoded(photograph(1400, 1200), "jpeg")
    seen = Picture(data)
    seen.resized((0, 0, 300, 300), 256)
    assert torch.equal(CanonicalView(256)(seen, ()), CanonicalView(256)(Picture(data), ()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(photograph(60, 40), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    picture = Picture(data)
    assert picture.size == upright.size
    assert (array(picture.pixels()) == np.asarray(upright.convert("RGB"))).all()


@pytest.mark.parametrize(
    ("kind", "value"), [(2, b"6\0"), (1, b"\6"), (7, b"\6"), (3, b"\0\0"), (3, b"\x09\0"), (3, b"\xff\xff")]
)
def test_orientations_that_say_nothing(kind: int, value: bytes) -> None:
    """kind: of TIFF's types; text, bytes, undefined, and numbers that are no orientation."""
    count = len(value) if kind == 2 else 1
    exif = b"Exif\0\0" + struct.pack("<2sHIHHHI4sI", b"II", 42, 8, 1, 274, kind, count, value, 0)
    data = encoded(photograph(60, 40), "jpeg", exif=exif)
    view = CanonicalView(16)(Picture(data), ())
    assert view.shape == (3, 16, 16)
    plain = np.asarray(Image.open(io.BytesIO(data)))
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    found = array(Picture(data).pixels())
    assert found.shape in (plain.shape, turned.shape)
    assert (found == (plain if found.shape == plain.shape else turned)).all()


def _transparent() -> Image.Image:
    image = photograph(40, 30).convert("RGBA")
    alpha = np.zeros((30, 40), np.uint8)
    alpha[:, 20:] = 255
    image.putalpha(Image.fromarray(alpha))
    return image


def _deep() -> Image.Image:
    return Image.fromarray((np.arange(1200).reshape(30, 40) * 54).astype(np.uint16))


KINDS: dict[str, tuple[Callable[[], bytes], Callable[[], np.ndarray]]] = {
    "grey jpeg": (
        lambda: encoded(photograph(40, 30).convert("L"), "jpeg"),
        lambda: np.asarray(Image.open(io.BytesIO(encoded(photograph(40, 30).convert("L"), "jpeg"))).convert("RGB")),
    ),
    "cmyk jpeg": (
        lambda: encoded(photograph(40, 30).convert("CMYK"), "jpeg"),
        lambda: np.asarray(Image.open(io.BytesIO(encoded(photograph(40, 30).convert("CMYK"), "jpeg"))).convert("RGB")),
    ),
    "palette": (
        lambda: encoded(photograph(40, 30).quantize(16), "png"),
        lambda: np.asarray(photograph(40, 30).quantize(16).convert("RGB")),
    ),
    "grey with alpha": (
        lambda: encoded(_transparent().convert("LA"), "png"),
        lambda: np.where(
            np.arange(40)[None, :, None] < 20, 255, np.asarray(_transparent().convert("L"))[:, :, None].repeat(3, 2)
        ),
    ),
    "transparent": (
        lambda: encoded(_transparent(), "png"),
        lambda: np.where(np.arange(40)[None, :, None] < 20, 255, np.asarray(photograph(40, 30))),
    ),
    "one bit": (
        lambda: encoded(photograph(40, 30).convert("1"), "png"),
        lambda: np.asarray(photograph(40, 30).convert("1").convert("RGB")),
    ),
    "16 bits": (
        lambda: encoded(_deep(), "png"),
        lambda: (np.arange(1200).reshape(30, 40, 1) * 54 // 256).repeat(3, 2),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_pictures(kind: str) -> None:
    data, expected = (make() for make in KINDS[kind])
    assert (array(Picture(data).pixels()) == expected).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no picture", "not an image"),
        (b"", "not an image"),
        (encoded(photograph(64, 64), "jpeg")[:-40], "truncated"),
        (encoded(photograph(64, 64), "png")[:-80], "truncated"),
    ],
)
def test_damaged_pictures(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        Picture(data).pixels()


def test_crops_are_drawn_evenly_and_by_their_key_alone() -> None:
    data = encoded(photograph(100, 60), "png")
    view = TrainView(16, (0.3, 1.0), flip=True)
    views = [view(Picture(data), (1, 2, n)) for n in range(40)]
    assert torch.equal(view(Picture(data), (1, 2, 3)), views[3])
    assert len({array(v).tobytes() for v in views}) == 40
    ramp = Picture(torch.arange(100, dtype=torch.uint8).expand(3, 60, 100))
    directions = [int(v[0, 8, -1]) > int(v[0, 8, 0]) for v in (view(ramp, (n,)) for n in range(300))]
    assert 110 < sum(directions) < 190
    narrow = [view(Picture(torch.zeros(3, 400, 3, dtype=torch.uint8)), (n,)) for n in range(20)]
    assert all(v.shape == (3, 16, 16) for v in narrow)


def on_white(image: Image.Image) -> np.ndarray:
    """(H, W, 3) by Pillow alone: upright, transparent pixels on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))


def turned(kind: str, orientation: int, by: str) -> dict[str, object]:
    """How a picture is saved that lies on its side, as EXIF or XMP says."""
    if by == "exif" and kind != "gif":
        exif = Image.Exif()
        exif[274] = orientation
        return {"exif": exif}
    xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'
    if by == "xmp" and kind == "png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp)
        return {"pnginfo": text}
    return {"xmp": xmp.encode()} if by == "xmp" and kind in ("jpeg", "webp") else {}


CLEAR = {
    "png": {"1": 0, "L": 85, "P": 1, "RGB": (85, 85, 85), "I;16": 85 * 257},
    "gif": {"L": 1, "P": 1},
}
MODES = {
    "png": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "jpeg": ["L", "RGB", "CMYK"],
    "webp": ["RGB", "RGBA"],
    "gif": ["1", "L", "P"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
@given(
    orientation=st.integers(0, 9),
    by=st.sampled_from(["", "exif", "xmp"]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 9),
    clear=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_all_modes_and_orientations_as_by_pillow(
    kind: str, mode: str, orientation: int, by: str, size: tuple[int, int], seed: int, clear: bool
) -> None:
    """Pixels of four levels; one of them transparent, where the mode has that."""
    draw = np.random.default_rng(seed)
    levels = draw.choice([0, 85, 170, 255], (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(levels if mode != "I;16" else levels[..., 0].astype(np.uint16) * 257)
    image = image if mode == "I;16" else image.quantize(8) if mode == "P" else image.convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(levels[..., 1]))
    options = {"lossless": True} if kind == "webp" else {}
    if clear and mode in CLEAR.get(kind, {}):
        options["transparency"] = CLEAR[kind][mode]
    data = encoded(image, kind, **options, **turned(kind, orientation, by))
    expected = on_white(Image.open(io.BytesIO(data)))
    if mode == "I;16" and clear:
        hidden = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) == CLEAR["png"]["I;16"]
        expected = np.where(hidden[..., None], 255, expected)
    pictures = [Picture.of(Image.open(io.BytesIO(data)))]
    if kind != "gif":  # of shards and files, those are refused
        pictures.append(Picture(data))
    for picture in pictures:
        assert picture.size == expected.shape[1::-1]
        assert (array(picture.pixels()) == expected).all()


def png(depth: int, colour: int, rows: list[bytes], width: int, clear: bytes) -> bytes:
    """As its specification has it; Pillow writes few depths."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"tRNS", clear)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(1, 0, [b"\x40"], 2, b"\0\1"), [0, 255]),
        (png(2, 0, [b"\x1b"], 4, b"\0\1"), [0, 255, 170, 255]),
        (png(4, 0, [b"\x0f\x70"], 3, b"\0\7"), [0, 255, 255]),
        (png(4, 0, [b"\x0f\x70"], 3, b"\0\0"), [255, 255, 119]),
        (png(8, 0, [b"\0\x55\xff"], 3, b"\0\x55"), [0, 255, 255]),
        (png(16, 0, [b"\x12\x34\x12\x35"], 2, b"\x12\x34"), [255, 18]),
        (png(8, 2, [b"\0\0\0\1\1\1"], 2, bytes(6)), [255, 1]),
        (png(16, 2, [bytes(6) + b"\x20\0" * 3], 2, b"\x20\0" * 3), [0, 255]),
        (png(16, 2, [bytes(6) + b"\x20\0" * 3], 2, bytes(6)), [255, 32]),
    ],
)  # fmt: skip
def test_a_transparent_colour_at_each_depth(data: bytes, expected: list[int]) -> None:
    for picture in (Picture(data), Picture.of(Image.open(io.BytesIO(data)))):
        assert array(picture.pixels())[0, :, 0].tolist() == expected
        assert (array(picture.pixels()) == array(picture.pixels())[..., :1]).all()


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xff\xff"])
def test_fill_bytes_before_orientation(filling: bytes) -> None:
    """A JPEG may have them before any marker."""
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(photograph(20, 10), "jpeg", exif=exif)
    place = data.index(b"\xff\xe1")
    data = data[:place] + filling + data[place:]
    assert Picture(data).size == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (10, 20)
