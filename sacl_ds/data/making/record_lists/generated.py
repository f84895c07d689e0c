"""Records of the built-in scenes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial

from PIL import Image

from sacl_ds.data.making.record import Record
from sacl_ds.data.scenes import Scenes


class SceneRecords:
    """Records of scenes as PNG, each drawn when it is asked for: JPEG would blur their edges."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self.scenes)):
            yield Record(
                key=self.scenes.key(index),
                captions=[caption.text for caption in self.scenes.captions(index)],
                load=partial(_png, self.scenes, index),
                meta={"scene_seed": self.scenes.seed, "scene_index": index},
                where=f"scene {index}",
            )


def scene_records(count: int, seed: int, image_size: int, detail: str) -> SceneRecords:
    """Return records of `count` built-in scenes."""
    return SceneRecords(Scenes(count, seed, image_size, detail))


def _png(scenes: Scenes, index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scenes.image(index)).save(buffer, "png")
    return buffer.getvalue()
