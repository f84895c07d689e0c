"""A small image encoder that selects patches, and pictures and texts for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sacl_ds.config import PatchSelectionConfig
from sacl_ds.model.patch_selection import SelectingEncoder

WIDTH, HEADS, DEPTH = 32, 2, 4


MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)


def encoder(
    placement: str, *, guide: str = "text", score: str = "keys", size: int = 32, name: str = "vit_tiny_patch16_224",
    seed: int = 0, **settings: object,
) -> SelectingEncoder:  # fmt: skip
    """Four layers over (size / 8)^2 patches, of which layers 2 and 3 select; weights large enough to tell apart."""
    torch.manual_seed(seed)
    arguments = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": 8}
    chosen = {"placement": placement, "guide": guide, "score": score, "layers": [2, 3], **settings}
    selection = PatchSelectionConfig.model_validate(chosen)
    made = SelectingEncoder(name, size, MEAN, STD, False, arguments, selection=selection)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.double()


def pixels(count: int, size: int = 32, seed: int = 1) -> Tensor:
    drawn = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8)


def texts(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
