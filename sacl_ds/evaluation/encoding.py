"""Features of all images and captions, and the states of captions, each encoded once by one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sacl_ds.data.batch import View
from sacl_ds.data.sample import SampleFault
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.distributed import gather_objects, gather_rows, rank, row_counts, world_size
from sacl_ds.errors import SharedError
from sacl_ds.evaluation.rounds import Done, ImageRounds, LoadedImage, RetrievalSet, require_few, require_finite
from sacl_ds.model.sacl import SaclModel


@dataclass(frozen=True)
class TextStates:
    """Token states of m captions without padding. states: (tokens, width) on the CPU, in the encoder's own type;
    starts: (m + 1,) int64, where each caption begins."""

    states: Tensor
    starts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(m,) int64: tokens of each caption."""
        return np.diff(self.starts)

    def batch(self, texts: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Pad the states of some captions to (b, L, width) with zeros; returns them with their (b, L) int64 mask."""
        lengths = torch.from_numpy(self.lengths[texts])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        states = self.states.new_zeros(*mask.shape, self.states.shape[1])
        states[mask] = torch.cat([self.states[self.starts[text] : self.starts[text + 1]] for text in texts])
        return states, mask.long()


@dataclass(frozen=True)
class Encoded:
    """Features of all n images that could be read and of their m captions, equal on every rank.

    numbers: (n,) int64, ascending: where an image stands in the source. owner: (m,) int64, ascending: the place, 0 to n
    - 1, of a caption's image. image (n, d), text (m, d): unit features, float32. states: where they were asked for.
    """

    numbers: np.ndarray
    keys: list[str]
    captions: list[str]
    owner: np.ndarray
    image: np.ndarray
    text: np.ndarray
    states: TextStates | None
    faults: list[SampleFault]


def encode(
    model: SaclModel, data: RetrievalSet, view: View, device: torch.device, batch_size: int, states: bool, done: Done
) -> Encoded:
    """Encode every world-th image and a share of the captions on each rank, and gather all on every rank.

    All ranks run equally many forward passes: under ZeRO 3 every pass is collective. Raises SharedError where too many
    images cannot be read, or all, and where features are not finite.
    """
    rounds = ImageRounds(data, view, batch_size)
    features: list[np.ndarray] = []
    listed: list[tuple[int, str, list[str]]] = []
    for part in rounds:
        made = model.encode_image(stacked(part, view, device))[1]
        features.append(made[: len(part)].float().cpu().numpy())
        listed += [(each.number, each.key, each.captions) for each in part]
        done("images", len(listed) + len(rounds.faults), len(data.mine))
    found: list[tuple[tuple[int, str, list[str]], np.ndarray]] = []
    faults: list[SampleFault] = []
    for theirs, rows, wrong in gather_objects((listed, np.concatenate(features), rounds.faults)):
        found += zip(theirs, rows, strict=True)
        faults += wrong
    found.sort(key=lambda each: each[0][0])
    check(faults, data)
    keys = [key for (_, key, _), _ in found]
    captions = [caption for (_, _, said), _ in found for caption in said]
    if not captions:
        raise SharedError(f"none of {data.count} images can be read with a caption: {faults[0] if faults else ''}")
    image = np.stack([row for _, row in found])
    require_finite(image, keys, "image features")
    text, text_states = encode_texts(model, captions, view, device, batch_size, states, done)
    return Encoded(
        numbers=np.array([number for (number, _, _), _ in found]),
        keys=keys,
        captions=captions,
        owner=np.repeat(np.arange(len(found)), [len(said) for (_, _, said), _ in found]),
        image=image,
        text=text,
        states=text_states,
        faults=faults,
    )


def stacked(part: Sequence[LoadedImage], view: View, device: torch.device) -> Tensor:
    """Stack images to (b, 3, size, size) uint8; one black picture where there is none, for a pass that others need."""
    images = [each.image for each in part] or [torch.zeros(3, view.image.size, view.image.size, dtype=torch.uint8)]
    return torch.stack(images).to(device)


def check(faults: Sequence[SampleFault], data: RetrievalSet) -> str | None:
    """Return a line on the images that are left out, if any. Raises SharedError where they are too many."""
    if faults and not data.setting:
        raise SharedError(
            f"{len(faults)} of {data.count} images cannot be used: {faults[0]}; put them right or leave them out of "
            "the set: what is compared must be the same everywhere"
        )
    return require_few(faults, data.count, data.max_bad_share, data.setting)


def encode_texts(
    model: SaclModel,
    captions: Sequence[str],
    view: View,
    device: torch.device,
    batch_size: int,
    states: bool,
    done: Done,
) -> tuple[np.ndarray, TextStates | None]:
    """Encode captions to unit features (m, d) float32 and, where asked for, their states, equal on every rank.

    They are gathered a round at a time, so that no device holds them all.
    """
    rows = view.tokenizer.ids(captions)
    together = batch_size * world_size()
    features: list[np.ndarray] = []
    tokens: list[Tensor] = []
    for start in range(0, len(rows), together):
        mine = rows[start + rank() * batch_size : start + (rank() + 1) * batch_size]
        given = mine or [[view.tokenizer.pad_id]]
        mask = attention_mask(given)
        ids = torch.from_numpy(pad(given, view.tokenizer.pad_id)).to(device)
        made, unit = model.encode_text(ids, torch.from_numpy(mask).to(device))
        features.append(_gathered(unit[: len(mine)].float()).numpy())
        if states:
            kept = torch.from_numpy(mask[: len(mine)]).bool().to(device)
            tokens.append(_gathered(made[: len(mine)][kept]))
        done("captions", min(start + together, len(rows)), len(rows))
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    joined = np.concatenate(features)
    require_finite(joined, captions, "text features")
    return joined, TextStates(torch.cat(tokens), starts) if states else None


def _gathered(rows: Tensor) -> Tensor:
    """Gather all ranks' (n, width) rows in rank order, on the CPU. As bytes: not every backend sends every type."""
    sent = rows.contiguous().view(torch.uint8)
    return gather_rows(sent, row_counts(sent)).cpu().view(rows.dtype)
