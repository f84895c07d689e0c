"""Draws a scene: antialiased sprites on a 3x3 grid, for any image size that the grid divides."""

from __future__ import annotations

from functools import cache

import numpy as np

from sacl_ds.data.scene_language import BACKGROUNDS, COLOUR, PLACE, SHAPE, SHAPES, SIZE, TEXTURE, TEXTURES, Scene

GRID = 3
_COLOUR_RGB = np.array(
    [
        (220, 40, 40),
        (40, 170, 60),
        (50, 80, 220),
        (235, 215, 50),
        (130, 50, 170),
        (70, 205, 215),
    ],
    np.float32,
)
_BACKGROUND_RGB = np.array([(18, 18, 18), (238, 238, 238), (128, 128, 128), (96, 64, 40)], np.float32)
_RADIUS = (0.28, 0.45)  # of a cell: small, large
_SUPERSAMPLING = 4
_JITTERS = 3  # sprite positions per axis: one pixel up, none, one pixel down (at 16-pixel cells)

assert len(_BACKGROUND_RGB) == len(BACKGROUNDS)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a shape of radius 1 around the origin covers (x right, y down)."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r <= 1
    if shape == "ring":
        return (r <= 1) & (r >= 0.55)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.85
    if shape == "triangle":
        return (y <= 0.8) & (abs(x) <= (y + 1) * 0.55)
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)
    raise AssertionError(shape)


@cache
def _sprites(cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (shape, size, jitter_y, jitter_x, cell, cell) and texture brightness (texture, cell, cell), float32."""
    n = cell * _SUPERSAMPLING
    grid = (np.arange(n) + 0.5) / n - 0.5
    step = max(1.0, cell / 16) / cell
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
    texture[1] = np.where(np.floor((x + y) / 2) % 2 == 0, 1.0, 0.35)
    texture[2] = np.where((np.floor(x / 2) % 2 == 0) & (np.floor(y / 2) % 2 == 0), 0.25, 1.0)
    return coverage, texture


def render(scene: Scene, image_size: int, entropy: tuple[int, ...]) -> np.ndarray:
    """(image_size, image_size, 3) uint8 picture of `scene`; `entropy` seeds jitter, shading and pixel noise."""
    if image_size % GRID:
        raise ValueError(f"image_size={image_size}: scenes need a multiple of {GRID}, e.g. 48 or 96")
    cell = image_size // GRID
    coverage, texture = _sprites(cell)
    words = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(16 + (image_size * image_size * 3 + 7) // 8)
    choice = words[:16].tolist()
    picture = np.empty((image_size, image_size, 3), np.float32)
    picture[:] = _BACKGROUND_RGB[scene.background] + (choice[15] % 17 - 8)
    for number, thing in enumerate(scene.objects):
        word = choice[number]
        jitter_y, jitter_x = word % _JITTERS, (word >> 8) % _JITTERS
        shade = 0.85 + ((word >> 16) % 256) / 256 * 0.3
        top, left = (cell * part for part in divmod(thing[PLACE], GRID))
        alpha = coverage[thing[SHAPE], thing[SIZE], jitter_y, jitter_x][:, :, None]
        ink = texture[thing[TEXTURE]][:, :, None] * (_COLOUR_RGB[thing[COLOUR]] * shade)
        region = picture[top : top + cell, left : left + cell]
        region += alpha * (ink - region)
    noise = words[16:].view(np.uint8)[: picture.size].reshape(picture.shape) & 15
    return np.clip(picture + noise - 7.5, 0, 255).astype(np.uint8)
