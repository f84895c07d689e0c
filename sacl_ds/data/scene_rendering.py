"""Draws a scene: antialiased sprites on a 3x3 grid, for any image size that the grid divides."""

from __future__ import annotations

from functools import cache

import numpy as np

from sacl_ds.data.draws import noise_bytes, words
from sacl_ds.data.scene_language import BACKGROUNDS, COLOUR, PLACE, SHAPE, SHAPES, SIZE, TEXTURE, TEXTURES, Scene

GRID = 3
_COLOUR_RGB = np.array(
    [
        (230, 40, 40),
        (40, 170, 60),
        (50, 80, 220),
        (235, 215, 50),
        (130, 50, 170),
    ],
    np.float32,
)
_BACKGROUND_RGB = np.array([(64, 64, 64), (168, 168, 168), (116, 116, 116), (124, 92, 64)], np.uint8)
_RADIUS = (0.36, 0.49)  # of a cell: small, large
_SUPERSAMPLING = 8
_JITTERS = 3  # sprite positions per axis: half a pixel up, none, down (of 16-pixel cells)

assert len(_BACKGROUND_RGB) == len(BACKGROUNDS)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mask of the points (x right, y down) that a shape of radius 1 around the origin covers.

    The shapes overlap little with each other: at 16 pixels a circle and a square would differ in their corners alone.
    """
    r = np.hypot(x, y)
    if shape == "circle":
        return r <= 0.7
    if shape == "ring":
        return (r <= 1) & (r >= 0.68)
    if shape == "bar":
        return (abs(y) <= 0.3) & (abs(x) <= 1)
    if shape == "cross":
        return (np.minimum(abs(x - y), abs(x + y)) <= 0.4) & (np.maximum(abs(x), abs(y)) <= 0.85)
    raise AssertionError(shape)


@cache
def _sprites(cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (shape, size, jitter_y, jitter_x, cell, cell, 1) and brightness (texture, cell, cell, 1), float32."""
    n = cell * _SUPERSAMPLING
    grid = (np.arange(n) + 0.5) / n - 0.5
    step = 0.5 / 16
    coverage = np.empty((len(SHAPES), 2, _JITTERS, _JITTERS, cell, cell), np.float32)
    for s, shape in enumerate(SHAPES):
        for z, radius in enumerate(_RADIUS):
            for j in range(_JITTERS):
                for i in range(_JITTERS):
                    y, x = np.meshgrid(grid - (j - 1) * step, grid - (i - 1) * step, indexing="ij")
                    hit = _inside(shape, x / radius, y / radius)
                    coverage[s, z, j, i] = hit.reshape(cell, _SUPERSAMPLING, cell, _SUPERSAMPLING).mean((1, 3))
    y, x = np.mgrid[0:cell, 0:cell] / cell * 16
    texture = np.ones((len(TEXTURES), cell, cell), np.float32)
    texture[1] = np.where(np.floor((x + y) / 2) % 2 == 0, 1.0, 0.45)
    texture[2] = np.where((np.floor(x / 2) % 2 == 0) & (np.floor(y / 2) % 2 == 0), 0.4, 1.0)
    return coverage[..., None], texture[..., None]


def render(scene: Scene, image_size: int, entropy: tuple[int, ...]) -> np.ndarray:
    """(image_size, image_size, 3) uint8 picture of `scene`; `entropy` seeds jitter, shading and pixel noise."""
    if image_size % GRID:
        raise ValueError(f"image_size={image_size}: scenes need a multiple of {GRID}, e.g. 48 or 96")
    cell = image_size // GRID
    coverage, texture = _sprites(cell)
    drawn = words(len(scene.objects) + 1, *entropy)
    picture = np.empty((image_size, image_size, 3), np.uint8)
    picture[:] = _BACKGROUND_RGB[scene.background] + drawn[-1] % 17
    for thing, word in zip(scene.objects, drawn, strict=False):
        jitter_y, jitter_x = word % _JITTERS, (word >> 8) % _JITTERS
        shade = 0.8 + ((word >> 16) % 256) / 256 * 0.2
        top, left = (cell * part for part in divmod(thing[PLACE], GRID))
        alpha = coverage[thing[SHAPE], thing[SIZE], jitter_y, jitter_x]
        ink = texture[thing[TEXTURE]] * (_COLOUR_RGB[thing[COLOUR]] * np.float32(shade))
        region = picture[top : top + cell, left : left + cell]
        region[:] = region + alpha * (ink - region)
    # every value so far is at most 239: the noise cannot wrap around
    return picture + (noise_bytes(picture.size, *entropy, 1).reshape(picture.shape) & 15)
