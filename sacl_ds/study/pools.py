"""Pools of training data: scenes whose cells have gone through the frozen stem once, with captions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sacl_ds.checksums import seal
from sacl_ds.data.scene_language import Caption, Scene
from sacl_ds.data.scenes import VERSION, Scenes
from sacl_ds.data.text import Tokenizer, pad, train_wordpiece
from sacl_ds.study.cache import keep_array, kept_array
from sacl_ds.study.recognition import Stem, cells_of

_PART = 2000  # scenes drawn and encoded at a time
MAX_TOKENS = 40


@dataclass(frozen=True)
class Pool:
    """Pool of n scenes, each with k captions."""

    scenes: list[Scene]
    captions: list[Caption]  # n * k, scene after scene
    tokens: Tensor  # (n, CELLS, width) float32, of the stem
    ids: Tensor  # (n * k, L) int64 token ids, 0 (the padding) behind their end
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
