"""How pre-training's texts go through text and fusion encoder: as seldom as the losses allow, and without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_ds.data.batch import Batch, places_of
from sacl_ds.data.text import IGNORED
from sacl_ds.losses import HardNegatives
from sacl_ds.model.indexing import take
from sacl_ds.model.packing import Packing
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.vision import ImageStates


def encoded_texts(model: SaclModel, batch: Batch, masked: bool) -> Tensor:
    """States of the captions, (b, L, width), and behind them, where `masked`, of the masked captions: (2b, L, width).

    Padding is not computed where the batch says which tokens are real.
    """
    ids, mask, places = batch.input_ids, batch.attention_mask, batch.token_places
    if masked:
        assert batch.masked_ids is not None
        ids, mask = torch.cat([ids, batch.masked_ids]), mask.repeat(2, 1)
        places = _stacked([places, places], batch.input_ids)
    return model.text_encoder(ids, mask, places)


def fused_texts(
    model: SaclModel, image_states: ImageStates, text_states: Tensor, negatives: HardNegatives | None, batch: Batch
) -> Tensor:
    """All that ITM and MLM need of the fusion encoder, in one pass, so that it takes an image's keys and values once.

    text_states: as from `encoded_texts`. Returns (n, L, width), one after another: captions and each image's hard text,
    masked captions if there are any, and captions with their hard image; the last b texts alone where negatives is
    None. Where texts choose patches, each chooses its own: a masked caption by itself, since the whole one would give
    away what is masked.
    """
    b, mask, real = len(batch), batch.attention_mask, batch.token_places
    captions, masked = text_states[:b], [text_states[b:]] if len(text_states) > b else []
    if negatives is None:
        states, repeats, places = text_states[-b:], 1, real
    else:
        hard = take(captions, negatives.text)
        states, repeats = torch.cat([captions, hard, *masked, captions]), 2 + len(masked)
        mask = torch.cat([mask, mask[negatives.text], *[mask] * len(masked), mask])
        # which texts are hard is known on the device alone, and so are their lengths
        whole = None if real is None else torch.arange(mask.shape[1] * b, device=real.device)
        places = _stacked([real, whole, *[real] * len(masked), real], batch.input_ids)
    hard_images = None if negatives is None else negatives.image
    if image_states.scored is None:
        return model.fuse(states, mask, image_states.tokens, repeats=repeats, images=hard_images, places=places)
    looked_at = None
    if hard_images is not None:
        looked_at = torch.cat([torch.arange(b, device=hard_images.device).repeat(repeats), hard_images])
    image_tokens = model.image_tokens(image_states, states[:, 0], looked_at)
    return model.fuse(states, mask, image_tokens, places=places)


def masked_texts(model: SaclModel, batch: Batch) -> Tensor:
    """(b, L, width) states of the masked captions."""
    assert batch.masked_ids is not None
    return model.text_encoder(batch.masked_ids, batch.attention_mask, batch.token_places)


def predictions(model: SaclModel, fused: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the fused masked captions, (b, L, width): (n, vocabulary) logits of the masked tokens, and which they were."""
    assert batch.mlm_labels is not None
    places = batch.mlm_places
    if places is None:
        places = places_of(batch.mlm_labels != IGNORED)
    masked = Packing.of(batch.mlm_labels, places)
    return model.token_logits(masked.pack(fused)), masked.pack(batch.mlm_labels)


def predicted_tokens(model: SaclModel, image_states: ImageStates, batch: Batch) -> Tensor:
    """(n, vocabulary) logits of the batch's masked tokens, from the masked captions and the images."""
    fused = fused_texts(model, image_states, masked_texts(model, batch), None, batch)
    return predictions(model, fused, batch)[0]


def _stacked(parts: list[Tensor | None], ids: Tensor) -> Tensor | None:
    """Places of real tokens in several batches of texts like `ids`, (b, L), when these stand below each other."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return torch.cat([part + number * ids.numel() for number, part in enumerate(known)])
