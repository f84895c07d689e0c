"""Scenes: the built-in data set. Small pictures with captions whose false negatives are known exactly.

No files, no network: item i of `Scenes(count, seed)` is computed from (VERSION, seed, i), so any process can make
any item, and any number of fresh ones. `relevance` says which captions are true of which pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
import torch

from sacl_ds.data.draws import noise_bytes, words
from sacl_ds.data.order import Block
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import Numbers, Sample
from sacl_ds.data.scene_language import (
    BACKGROUNDS,
    COLOUR,
    PLACE,
    SHAPE,
    SHAPES,
    SIZE,
    TEXTURE,
    TEXTURES,
    Caption,
    Draws,
    Scene,
    draw_captions,
    draw_pair_statement,
    draw_questions,
    draw_scene,
    relevance,
)

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


VERSION = 1  # raise it when any picture or sentence changes: studies compare like with like
CAPTIONS_PER_SCENE = 4
DETAILS = ("partial", "simple", "detailed")
_INDEX_DIGITS = 9  # of a key, after the seed
_CAPTIONS, _PICTURE, _QUESTIONS, _PAIRS = range(1, 5)


@dataclass(frozen=True, slots=True)
class SceneItem:
    key: str
    image: np.ndarray  # (image_size, image_size, 3) uint8
    captions: list[str]


class Scenes:
    """A data set of `count` scenes; item i is the same for every process, image size and count.

    detail: "partial" captions say something of one or two objects (the training set); "simple" ones name one object
    by its colour and shape, "detailed" ones say so much that they are true of few other pictures (clean
    captioned sets for a teacher).
    """

    def __init__(
        self, count: int, seed: int, image_size: int = 48, detail: str = "partial", captions: int = CAPTIONS_PER_SCENE
    ) -> None:
        if count < 1:
            raise ValueError(f"count={count}: a set of scenes needs at least one")
        if detail not in DETAILS:
            raise ValueError(f"detail={detail!r}: choose one of {', '.join(DETAILS)}")
        self.count, self.seed, self.image_size, self.detail = count, seed, image_size, detail
        self.captions_per_scene = captions

    def __len__(self) -> int:
        return self.count

    def _index(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        return index

    def scene(self, index: int) -> Scene:
        return draw_scene(Draws(VERSION, self.seed, self._index(index), count=32))

    def captions(self, index: int) -> list[Caption]:
        draws = Draws(VERSION, self.seed, self._index(index), _CAPTIONS, count=32 * self.captions_per_scene)
        return draw_captions(draws, self.scene(index), self.captions_per_scene, self.detail)

    def image(self, index: int) -> np.ndarray:
        return render(self.scene(index), self.image_size, (VERSION, self.seed, self._index(index), _PICTURE))

    def questions(self, index: int) -> list[tuple[str, str, str]]:
        """(type, question, answer) triples about scene `index`, for VQA."""
        return draw_questions(Draws(VERSION, self.seed, self._index(index), _QUESTIONS, count=16), self.scene(index))

    def pair_statement(self, left: int, right: int) -> tuple[str, bool]:
        """Draw a statement about two scenes and its truth, for NLVR2."""
        draws = Draws(VERSION, self.seed, self._index(left), self._index(right), _PAIRS, count=64)
        return draw_pair_statement(draws, self.scene(left), self.scene(right))

    def key(self, index: int) -> str:
        return f"{self.seed:04d}{self._index(index):0{_INDEX_DIGITS}d}"

    def __getitem__(self, index: int) -> SceneItem:
        return SceneItem(self.key(index), self.image(index), [caption.text for caption in self.captions(index)])

    def relevance(self) -> np.ndarray:
        """(count * captions_per_scene, count) float32; rows in the order of the items and their captions.

        1.0 where the caption is true of the picture: on the caption's own picture and on its false negatives.
        """
        captions = [caption for index in range(self.count) for caption in self.captions(index)]
        return relevance(captions, [self.scene(index) for index in range(self.count)])

    def fingerprint(self) -> str:
        """SHA-256 over all pictures, captions, questions and one statement each."""
        digest = hashlib.sha256()
        for index in range(self.count):
            item = self[index]
            digest.update(item.image.tobytes())
            said = (item.captions, self.questions(index), self.pair_statement(index, (index + 1) % self.count))
            digest.update(repr(said).encode())
        return digest.hexdigest()


def place_of(key: str) -> tuple[int, int] | None:
    """Parse (seed, index) from a scene's key (`Scenes.key`); None for a key that is no scene's."""
    if not (key.isascii() and key.isdigit() and len(key) > _INDEX_DIGITS):
        return None
    return int(key[:-_INDEX_DIGITS]), int(key[-_INDEX_DIGITS:])


class SceneSource:
    """Scenes as a `Source` of one shard; an undecoded sample is its index, drawn only where it is used."""

    weights = None

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes
        self.sets = [[len(scenes)]]

    def read(self, blocks: Iterator[Block]) -> Numbers:
        return Numbers(place.offset for block in blocks for place in block.places)

    def head(self, shard: int, count: int) -> Numbers:
        return Numbers(range(min(count, len(self.scenes))))

    def decode(self, raw: int) -> Sample:
        item = self.scenes[raw]
        picture = Picture(torch.from_numpy(item.image).permute(2, 0, 1))
        # a scene's pictures never repeat, so its key identifies the image
        return Sample(item.key, picture, item.captions, list(range(len(item.captions))), item.key.encode())

    def captions(self, limit: int) -> Iterator[str]:
        """Yield captions and the downstream tasks' texts about the scenes, so that the vocabulary covers both."""
        return islice(self._texts(), limit)

    def _texts(self) -> Iterator[str]:
        for index in range(len(self.scenes)):
            yield from (caption.text for caption in self.scenes.captions(index))
            yield from (text for _, question, answer in self.scenes.questions(index) for text in (question, answer))
            yield self.scenes.pair_statement(index, (index + 1) % len(self.scenes))[0]
