"""Examples of a task as a `Source`, and the image files that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.data.order import Block, GlobalOrder
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import BadSample, Numbers, SampleFault
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.sources import HELD_OUT, scene_size
from sacl_ds.errors import UserError

_SHUFFLED_TOGETHER = 2**17  # whole epochs of most sets; each loader process holds as many places


class ExampleSource:
    """A sequence of examples as a `Source` of one shard; an undecoded one is its number, made only where it is used.

    Examples may be made on the fly: the sequence must give the same one for the same number, in any process.
    """

    weights = None

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples
        self.sets = [[len(examples)]]

    def read(self, blocks: Iterator[Block]) -> Numbers:
        return Numbers(place.offset for block in blocks for place in block.places)

    def head(self, shard: int, count: int) -> Numbers:
        return Numbers(range(min(count, len(self.examples))))

    def decode(self, raw: int) -> Any:
        return self.examples[raw]

    def captions(self, limit: int) -> Iterator[str]:
        raise NotImplementedError  # of a task, its texts are (`sacl_ds.tasks`)


def example_order(source: ExampleSource, global_batch_size: int, seed: int) -> GlobalOrder:
    """Make the global order of examples: shuffled with 130,000 others, in most sets with all.

    Neighbours in the list, such as the captions of an image, never stand in one batch.
    """
    return GlobalOrder(source.sets, global_batch_size, seed, streams=1, shuffle_buffer=_SHUFFLED_TOGETHER)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Image with several candidate paths, of which the first that exists is read.

    key: what names it in error lines, for example 'image 9'.
    """

    key: str
    places: tuple[Path, ...]

    def picture(self) -> Picture:
        """Raises BadSample where no place has it, or what lies there is no image."""
        for path in self.places:
            try:
                return Picture(path.read_bytes())
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError) as error:  # BadImage, or a name with a zero byte
                reason = error.strerror if isinstance(error, OSError) else error
                raise BadSample(SampleFault("bad", "", self.key, f"{path} cannot be read: {reason}")) from None
        raise BadSample(SampleFault("bad", "", self.key, f"no file {' or '.join(map(str, self.places))}"))


@dataclass(frozen=True, slots=True)
class SceneImage:
    """Picture of a scene, drawn only when it is read."""

    scenes: Scenes
    index: int

    @property
    def key(self) -> str:
        return f"scene {self.scenes.key(self.index)}"

    def picture(self) -> Picture:
        return Picture(torch.from_numpy(self.scenes.image(self.index)).permute(2, 0, 1))


_SEEDS = {"train": 0, "val": HELD_OUT, "test": 2 * HELD_OUT}


def scenes_of(run: FinetuneConfig, split: str) -> Scenes:
    """Return the scenes of a split: those of val are the ones that a pre-training run of this seed holds out."""
    scenes = run.data.scenes
    count = scenes.count if split == "train" else scenes.eval_count
    return Scenes(count, scenes.seed + _SEEDS[split], scene_size(run.model.image_size), scenes.detail)


def images_folder(run: FinetuneConfig, folder: str | None = None, key: str = "data.images") -> Path:
    """Return data.images, or `folder` of the setting `key`. Raises UserError where it is not given, or no folder."""
    named = folder if folder is not None else run.data.images
    if named is None:
        raise UserError("data.images is missing: the folder of the images that the files name")
    path = Path(named)
    if not path.is_dir():
        raise UserError(f"{key if folder is not None else 'data.images'}={named}: no such folder; correct the path")
    return path
