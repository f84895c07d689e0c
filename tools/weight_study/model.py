"""Dual encoder of the study: a stem that recognises cells, transformers over cells and words, pools of pairs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sacl_ds.data.scene_language import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Caption, Scene
from sacl_ds.data.scenes import GRID, VERSION, Scenes
from sacl_ds.data.text import Tokenizer, pad, train_wordpiece
from sacl_ds.files import seal
from sacl_ds.model.sacl import LogitScale
from weight_study.cache import keep_array, keep_tensors, kept_array, kept_tensors


@dataclass(frozen=True)
class Shape:
    """Sizes of both towers."""

    width: int = 96
    image_layers: int = 1
    text_layers: int = 1
    heads: int = 4
    embed_dim: int = 96


class Tower(nn.Module):
    """Transformer from states (n, L, width) and a mask (n, L) bool to (n, embed_dim) unit vectors."""

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            shape.width, shape.heads, 3 * shape.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(shape.width), enable_nested_tensor=False)
        self.token_head = nn.Sequential(nn.Linear(shape.width, 2 * shape.width), nn.GELU())
        self.projection = nn.Linear(4 * shape.width, shape.embed_dim, bias=False)

    def forward(self, states: Tensor, there: Tensor) -> Tensor:
        states = self.token_head(self.encoder(states, src_key_padding_mask=~there))
        mask = there[..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        # what one token says is kept by the maximum, how often by the mean
        highest = states.masked_fill(~mask, -torch.inf).amax(1)
        return nn.functional.normalize(self.projection(torch.cat([mean, highest], 1)), dim=1)


class DualEncoder(nn.Module):
    def __init__(self, shape: Shape, stem_width: int, vocabulary: int, longest: int, scale: float = 1 / 0.07) -> None:
        super().__init__()
        self.cells = nn.Linear(stem_width, shape.width)
        self.places = nn.Parameter(torch.randn(CELLS, shape.width) * 0.5)
        self.words = nn.Embedding(vocabulary, shape.width)
        self.positions = nn.Parameter(torch.randn(longest, shape.width) * 0.5)
        self.image_tower = Tower(shape, shape.image_layers)
        self.text_tower = Tower(shape, shape.text_layers)
        self.logit_scale = LogitScale(scale)

    def image(self, tokens: Tensor) -> Tensor:
        """Encode pictures, (n, CELLS, stem width) -> (n, embed_dim)."""
        there = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return self.image_tower(self.cells(tokens) + self.places, there)

    def text(self, ids: Tensor) -> Tensor:
        """Encode captions, (n, L) int64, 0 where padded -> (n, embed_dim)."""
        ids = ids[:, : int((ids != 0).sum(1).max())]
        return self.text_tower(self.words(ids) + self.positions[: ids.shape[1]], ids != 0)


CELLS = GRID * GRID
_CELL = 16  # pixels
# shape, colour, size and texture of the object (the last class: none), and the background
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, len(TEXTURES) + 1, len(BACKGROUNDS))


@dataclass(frozen=True)
class StemSettings:
    width: int = 64
    hidden: int = 256
    scenes: int = 6000
    steps: int = 1500
    batch: int = 1024  # cells
    learning_rate: float = 2e-3
    seed: int = 77

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((VERSION, self)).encode()).hexdigest()[:12]


class Stem(nn.Module):
    """Encoder of cells: (n, CELLS, 3, 16, 16) float pixels in [-1, 1] -> (n, CELLS, width)."""

    def __init__(self, settings: StemSettings) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(-3),
            nn.Linear(3 * _CELL * _CELL, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.width),
        )
        self.heads = nn.ModuleList(nn.Linear(settings.width, classes) for classes in CLASSES)

    def forward(self, cells: Tensor) -> Tensor:
        states = self.body(cells)
        return nn.functional.layer_norm(states, states.shape[-1:])


def cells_of(images: np.ndarray) -> Tensor:
    """Cut images into cells: (n, 48, 48, 3) uint8 -> (n, CELLS, 3, 16, 16) float32 in [-1, 1], row by row."""
    n = len(images)
    pixels = torch.from_numpy(images).float().div_(127.5).sub_(1)
    return pixels.view(n, GRID, _CELL, GRID, _CELL, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, CELLS, 3, _CELL, _CELL)


def trained_stem(settings: StemSettings, folder: Path) -> Stem:
    """Load the stem from `folder`, or train it (under a minute on a core) and save it there."""
    path = folder / f"stem-{settings.fingerprint}.safetensors"
    stem = Stem(settings)
    if path.exists():
        stem.load_state_dict(kept_tensors(path))
        return stem.eval().requires_grad_(False)
    scenes = Scenes(settings.scenes, settings.seed)
    cells = cells_of(np.stack([scenes.image(i) for i in range(len(scenes))])).flatten(0, 1)
    truth = torch.from_numpy(truth_of_cells(scenes)).flatten(0, 1)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        stem = Stem(settings)
    optimizer = torch.optim.AdamW(stem.parameters(), settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps)
    for _ in range(settings.steps):
        rows = torch.randint(len(cells), (settings.batch,), generator=generator)
        states = stem(cells[rows])
        loss = sum(
            (nn.functional.cross_entropy(head(states), truth[rows, which]) for which, head in enumerate(stem.heads)),
            torch.zeros(()),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    keep_tensors(stem.state_dict(), path)
    return stem.eval().requires_grad_(False)


@torch.no_grad()
def truth_of_cells(scenes: Scenes) -> np.ndarray:
    """Return the classes of the scenes' cells, (count, CELLS, len(CLASSES)) int64."""
    truth = np.empty((len(scenes), CELLS, len(CLASSES)), np.int64)
    truth[:, :, :4] = np.array(CLASSES[:4]) - 1
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        truth[index, :, 4] = scene.background
        for *attributes, place in scene.objects:
            truth[index, place, :4] = attributes
    return truth


_PART = 2000  # scenes drawn and encoded at a time
MAX_TOKENS = 40


@dataclass(frozen=True)
class Pool:
    """Pool of n scenes, each with k captions."""

    scenes: list[Scene]
    captions: list[Caption]  # n * k, scene after scene
    tokens: Tensor  # (n, CELLS, width) float32, of the stem
    ids: Tensor  # (n * k, L) int64 token ids, 0 (the padding) after their end
    said: Tensor  # (n * k,) int64, equal for equal captions

    @property
    def per_scene(self) -> int:
        return len(self.captions) // len(self.scenes)

    def to(self, device: torch.device) -> Pool:
        return replace(self, tokens=self.tokens.to(device), ids=self.ids.to(device), said=self.said.to(device))


def vocabulary(folder: Path) -> Tokenizer:
    """Return the tokenizer of all pools, trained on captions of every kind."""
    path = folder / f"tokenizer-{VERSION}"
    if not path.exists():
        said = [
            caption.text
            for detail in ("partial", "simple", "detailed")
            for scenes in [Scenes(1500, 78, detail=detail)]
            for index in range(len(scenes))
            for caption in scenes.captions(index)
        ]
        temporary = path.with_name(f".{path.name}.writing")
        Tokenizer(train_wordpiece(said, 400), MAX_TOKENS).save(temporary)
        temporary.replace(path)
        seal(folder, (path.name,))
    tokenizer = Tokenizer.load(path, MAX_TOKENS)
    assert tokenizer.pad_id == 0
    return tokenizer


def pool(
    count: int,
    seed: int,
    detail: str,
    stem: Stem,
    stem_name: str,
    tokenizer: Tokenizer,
    folder: Path,
    captions: int = 4,
) -> Pool:
    """Make a pool of Scenes(count, seed, detail=detail); the stem's tokens are kept in `folder` and reused."""
    scenes = Scenes(count, seed, detail=detail, captions=captions)
    said = [caption for index in range(count) for caption in scenes.captions(index)]
    name = hashlib.sha256(repr((VERSION, count, seed, stem_name)).encode()).hexdigest()[:12]
    path = folder / f"tokens-{name}.npy"
    if not path.exists():
        parts = []
        for start in range(0, count, _PART):
            images = np.stack([scenes.image(index) for index in range(start, min(start + _PART, count))])
            parts.append(stem(cells_of(images)).half().numpy())
        keep_array(np.concatenate(parts), path)
    ids = torch.from_numpy(pad(tokenizer.ids([caption.text for caption in said]), tokenizer.pad_id))
    tokens = torch.from_numpy(kept_array(path)).float()
    numbers: dict[str, int] = {}
    same = torch.tensor([numbers.setdefault(caption.text, len(numbers)) for caption in said])
    return Pool([scenes.scene(index) for index in range(count)], said, tokens, ids, same)
