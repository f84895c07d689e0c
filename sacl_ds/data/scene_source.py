"""The built-in scenes as a `Source`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from sacl_ds.data.order import Block
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import Numbers, Sample
from sacl_ds.data.scenes import Scenes


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

    def iterate(self, limit: int | None, rank: int, world: int) -> Iterator[Sample]:
        for index in range(rank, min(len(self.scenes), limit or len(self.scenes)), world):
            yield self.decode(index)
