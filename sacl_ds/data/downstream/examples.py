"""Examples of a task as a `Source`, and the image files that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sacl_ds.data.faults import BadSample, SampleFault
from sacl_ds.data.order import Block, GlobalOrder
from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import Numbers

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

    def iterate(self, limit: int | None, rank: int, world: int) -> Iterator[Any]:
        for number in range(rank, min(len(self.examples), limit or len(self.examples)), world):
            yield self.decode(number)


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
