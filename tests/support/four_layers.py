"""A model of four layers over 64 patches, batches for it, and what autograd holds of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sacl_ds.config import ModelConfig
from sacl_ds.data.batch import Batch
from sacl_ds.data.text import IGNORED

LENGTH, PREDICTED, VOCABULARY, EMBEDDED = 10, 3, 50, 16


def config(selection: dict[str, Any], **more: Any) -> ModelConfig:
    """Four layers over 64 patches, of which layers 2 and 3 select."""
    values = {
        "image_encoder_arguments": {"embed_dim": 64, "depth": 4, "num_heads": 2, "patch_size": 8},
        "image_size": 64, "text_width": 64, "text_heads": 4, "text_layers": 2, "fusion_layers": 2,
        "embed_dim": EMBEDDED, "max_tokens": LENGTH, "patch_selection": {"layers": [2, 3], **selection},
    }  # fmt: skip
    return ModelConfig.model_validate(values | more)


def batch(pairs: int, size: int = 64) -> Batch:
    """Captions of one length, each with so many masked tokens."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (pairs, LENGTH), generator=g)
    masked = (torch.arange(LENGTH) < PREDICTED).expand(pairs, -1)
    return Batch(
        keys=[""] * pairs, captions=[""] * pairs, shards=[""] * pairs,
        images=torch.randint(0, 256, (pairs, 3, size, size), generator=g, dtype=torch.uint8),
        input_ids=ids, attention_mask=torch.ones_like(ids), pair_ids=torch.arange(pairs)[:, None],
        masked_ids=ids.masked_fill(masked, 4), mlm_labels=ids.masked_fill(~masked, IGNORED),
    )  # fmt: skip


class Held:
    """Bytes of the storages that autograd keeps, parameters and buffers aside."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        self._found: dict[int, Any] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._own:
            self._found[_storage(tensor)] = tensor.untyped_storage()  # held, so that its address is not used again
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._found.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def similarities(pairs: int) -> int:
    """FLOPs of the batch's matrix of them, which the contrastive loss and ITM's draw compute."""
    return 2 * 2 * pairs**2 * EMBEDDED
