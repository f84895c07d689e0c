"""A batch of image-text pairs as the model takes it, and how batches get onto the device, ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import combinations
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import SampleFault
from sacl_ds.data.text import IGNORED, Tokenizer

_PLACES = ("token_places", "mlm_places")


Self = TypeVar("Self", bound="Movable")
Moved = TypeVar("Moved", bound="Moves")


class Movable:
    """Base of a frozen dataclass, some of whose fields are tensors."""

    def to(self: Self, device: torch.device) -> Self:
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: Self) -> Self:
        """Copy CPU tensors to page-locked memory, from which copies to a GPU do not wait; GPU tensors are kept."""
        return self._mapped(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep GPU memory of these tensors until all work that `stream` holds now is done."""
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(stream)

    def _mapped(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class Batch(Movable):
    """b pairs. L is the longest caption of the batch; L_t the longest for the teacher's tokenizer.

    The teacher's fields are None where there is no teacher, or where it sees just what the model sees. Places are
    ascending, and found on the host, so that a device need not be waited for to know how many there are.
    """

    keys: list[str]
    captions: list[str]
    shards: list[str]  # "" for scenes
    images: Tensor  # (b, 3, H, W) uint8
    input_ids: Tensor  # (b, L) int64
    attention_mask: Tensor  # (b, L) int64
    pair_ids: Tensor  # (b, k) int64; a match in any column means that two pairs are not negatives of each other
    masked_ids: Tensor | None = None  # (b, L) int64
    mlm_labels: Tensor | None = None  # (b, L) int64, IGNORED where nothing is predicted
    token_places: Tensor | None = None  # (T,) int64, of the real tokens among the b * L; None: unknown
    mlm_places: Tensor | None = None  # (n,) int64, of the tokens that MLM predicts among the b * L; None: unknown
    teacher_images: Tensor | None = None  # (b, 3, H_t, W_t) uint8
    teacher_input_ids: Tensor | None = None  # (b, L_t) int64
    teacher_attention_mask: Tensor | None = None  # (b, L_t) int64
    teacher_features: Tensor | None = None  # (b, 2, d_t) float16: of image and text, computed beforehand
    faults: list[SampleFault] = field(default_factory=list)  # samples that others of this batch stand in for

    def __len__(self) -> int:
        return len(self.keys)

    def parts(self, rows: int) -> list[Batch]:
        """Split the pairs in order into micro-batches of `rows`, texts cut to each one's longest. Call it on the host.

        Faults stay with the whole batch: no micro-batch has any.
        """
        made = []
        for start in range(0, len(self), rows):
            cut = part_of(self, slice(start, start + rows), _TEXTS)
            if self.token_places is not None:
                cut["token_places"] = places_of(cut["attention_mask"])
            if self.mlm_places is not None:
                cut["mlm_places"] = places_of(cut["mlm_labels"] != IGNORED)
            made.append(Batch(**cut))
        return made


# what has the places of each mask
_TEXTS = {"attention_mask": ("input_ids", "masked_ids", "mlm_labels"), "teacher_attention_mask": ("teacher_input_ids",)}


def concatenate(batches: Sequence[Batch], pad_id: int, teacher_pad_id: int = 0) -> Batch:
    """The pairs of several batches, in order, padded to the longest of them."""
    if len(batches) == 1:
        return batches[0]
    padding = {"input_ids": pad_id, "masked_ids": pad_id, "mlm_labels": IGNORED, "teacher_input_ids": teacher_pad_id}
    joined: dict[str, Tensor | None] = {}
    for each in fields(Batch):
        parts = [getattr(batch, each.name) for batch in batches]
        if isinstance(parts[0], list):
            continue
        if parts[0] is None:
            joined[each.name] = None
            continue
        if each.name in _PLACES:
            joined[each.name] = _joined_places(parts, [batch.input_ids.shape for batch in batches])
            continue
        if parts[0].ndim == 2 and each.name != "pair_ids":
            longest = max(part.shape[1] for part in parts)
            fill = padding.get(each.name, 0)
            parts = [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
        joined[each.name] = torch.cat(parts)
    return Batch(
        keys=[key for batch in batches for key in batch.keys],
        captions=[caption for batch in batches for caption in batch.captions],
        shards=[shard for batch in batches for shard in batch.shards],
        faults=[fault for batch in batches for fault in batch.faults],
        **joined,  # type: ignore[arg-type]
    )


def places_of(mask: Tensor) -> Tensor:
    """Return the (T,) int64 flat indices, ascending, of the non-zero entries of (b, L). On a GPU this synchronises."""
    return mask.flatten().nonzero().squeeze(1)


def _joined_places(parts: Sequence[Tensor], shapes: Sequence[torch.Size]) -> Tensor:
    """Return the token indices of concatenated batches of these (b, L), once they are padded to the longest."""
    longest, before, moved = max(length for _, length in shapes), 0, []
    for places, (rows, length) in zip(parts, shapes, strict=True):
        moved.append((places // length + before) * longest + places % length)
        before += rows
    return torch.cat(moved)


def duplicates(pair_ids: Tensor) -> int:
    """Count the pairs of rows of the (n, k) ids of a global batch that share an id in any column, and so are no
    negatives.

    Uses inclusion and exclusion over the sets of columns: fit for few columns, and any number of rows.
    """

    def same(rows: Tensor) -> int:
        counts = torch.unique(rows, dim=0, return_counts=True)[1]
        return int((counts * (counts - 1) // 2).sum())

    columns = range(pair_ids.shape[1])
    sets = [list(some) for size in columns for some in combinations(columns, size + 1)]
    return sum((1 if len(some) % 2 else -1) * same(pair_ids[:, some]) for some in sets)


class ImageView(Protocol):
    @property
    def size(self) -> int:
        """Pixels a side."""

    def __call__(self, picture: Picture, entropy: tuple[int, ...]) -> Tensor:
        """Transform a picture to (3, size, size) uint8, drawn from `entropy` alone."""


class TextView(Protocol):
    @property
    def pad_id(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Digest that is equal for two tokenizers that give every caption the same ids."""

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids, cut to the model's length, not padded."""


@dataclass(frozen=True)
class View:
    """Transforms of an untrained model's input: teacher, evaluation."""

    image: ImageView
    tokenizer: TextView

    def same_images(self, other: View) -> bool:
        return self.image == other.image

    def same_text(self, other: View) -> bool:
        return self.tokenizer.fingerprint == other.tokenizer.fingerprint


@dataclass(frozen=True)
class TrainingView(View):
    """Transforms of the trained model's input; its tokenizer can also mask. for_text: the image transform for a given
    text, where that is not always `image`.

    for_text: the view of a picture of which this text speaks, where that is not always `image`.
    """

    tokenizer: Tokenizer
    for_text: Callable[[str], ImageView] | None = None

    def image_with(self, caption: str) -> ImageView:
        return self.for_text(caption) if self.for_text else self.image


def part_of(batch: Any, rows: slice, texts: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Select a batch's rows: texts are cut to the longest that is left, faults left with the whole.

    texts: for each mask of tokens, (b, L), the fields that have its places.
    """
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    cut = {name: value[rows] for name, value in values.items() if value is not None} | {"faults": []}
    for mask, others in texts.items():
        if mask in cut:
            longest = int(cut[mask].sum(1).max())
            cut |= {name: cut[name][:, :longest].contiguous() for name in (mask, *others) if name in cut}
    return cut


class Moves(Protocol):
    """Interface of what can be copied to a GPU asynchronously, as `Movable` can."""

    def to(self: Moved, device: torch.device) -> Moved:
        """Copy to the device, asynchronously from page-locked memory."""

    def pin_memory(self: Moved) -> Moved: ...

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the batch's memory until all work that `stream` holds by then is done."""


def ahead(batches: Iterable[Moved], device: torch.device) -> Iterator[Moved]:
    """The batches in order, on `device`. What `batches` raises is raised in its place, after the batches before it.

    On CUDA one batch more than was asked for is taken from `batches`, and copied on a stream of its own; a batch is to
    be used on the stream that is current where it is asked for. Elsewhere nothing is taken or copied ahead.
    """
    if device.type == "cuda":
        return _copied_ahead(iter(batches), device)
    return (batch.to(device) for batch in batches)


def _copied_ahead(batches: Iterator[Moved], device: torch.device) -> Iterator[Moved]:
    copies = _stream(device)
    coming = _start(batches, device, copies)
    while coming is not None:
        # the copy is waited for before the one after it begins: on one stream it would have to end as well
        used = torch.cuda.current_stream(device)
        used.wait_stream(copies)
        coming.record_stream(used)
        batch, failure = coming, None
        try:
            coming = _start(batches, device, copies)
        except Exception as error:  # whatever it is, it belongs after the batch at hand
            failure = error
        yield batch
        del batch  # or its memory would be held while the batch after the next is copied
        if failure is not None:
            raise failure


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for copies to a device: the allocator keeps freed memory for the stream that took it."""
    return torch.cuda.Stream(device)


def _start(batches: Iterator[Moved], device: torch.device, copies: torch.cuda.Stream) -> Moved | None:
    """Take the next batch and begin its copy; None at the end."""
    batch = next(batches, None)
    if batch is None:
        return None
    pinned = batch.pin_memory()
    with torch.cuda.stream(copies):
        return pinned.to(device)


def take(states: Tensor, places: Tensor) -> Tensor:
    """Return states[places], (n, ...), with a deterministic gradient: that of plain indexing with repeats is not."""
    return embedding(places, states.flatten(1)).unflatten(1, states.shape[1:])
