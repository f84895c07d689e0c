"""Text-guided patch selection (TRIPS: Jiang et al., EMNLP 2022): fewer image tokens, chosen by what the text asks for.

At a layer of the vision transformer every patch x_j gets a score from a guide, the rest of the layer sees the
`keep_rate` best patches in their order, and one token more: the mean of all others, weighted by their scores. The guide
is the text's [CLS] state, put through that layer's own query weights (or the image's [CLS], or chance), so that no
parameter is added and a model has the same state dict with and without.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Scored(NamedTuple):
    """Tokens of n images from which a selection may choose.

    tokens: (n, 1 + patches + fused, width), [CLS] first, and last, where `fused`, the token that an earlier selection
    left. keys: (n, heads, 1 + patches + fused, head width) of the layer's attention, and query: (n, heads, head width)
    of the image's [CLS].
    """

    tokens: Tensor
    keys: Tensor
    query: Tensor
    fused: bool = False

    @property
    def patches(self) -> int:
        return self.tokens.shape[1] - 1 - self.fused


def kept_count(patches: int, keep_rate: float) -> int:
    """Return how many patches are kept: the share, rounded up."""
    return min(patches, math.ceil(round(keep_rate * patches, 6)))


def attention_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Compute each key's attention, mean over the heads, float32 (float64 for float64 keys).

    query (n, heads, head width), keys (n, heads, m, head width) -> (n, m), each row sums to 1.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    with torch.autocast(keys.device.type, enabled=False):
        logits = torch.einsum("nhd,nhmd->nhm", query.to(wide), keys.to(wide)) * keys.shape[-1] ** -0.5
        return logits.softmax(-1).mean(1)


def token_scores(query: Tensor, tokens: Tensor) -> Tensor:
    """Compute softmax(q x^T / sqrt(width)) over tokens, the published form; float32 (float64 for float64 tokens).

    query (n, width), tokens (n, m, width) -> (n, m), each row sums to 1.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        logits = torch.einsum("nd,nmd->nm", query.to(wide), tokens.to(wide)) * tokens.shape[-1] ** -0.5
        return logits.softmax(-1)


def select(tokens: Tensor, scores: Tensor, keep: int, fused: bool = False) -> tuple[Tensor, Tensor]:
    """Keep [CLS] and the `keep` patches of highest score, in their order; fuse the others into one last token.

    tokens (n, 1 + patches + fused, width); scores (n, patches + fused) > 0, of all but [CLS]. fused: the last token is
    one that an earlier selection left: it is never kept, and goes into the new one by its score.
    Returns (n, 1 + keep + 1, width) and the places of the patches kept among all, (n, keep) int64, ascending. Gradients
    pass through the tokens and through the weights of the fused one. keep >= patches leaves everything as it is.
    """
    n, patches = len(tokens), tokens.shape[1] - 1 - fused
    if keep >= patches:
        return tokens, torch.arange(patches, device=tokens.device).expand(n, -1)
    ranked = scores[:, :patches].detach()
    places = ranked.topk(keep, dim=1).indices.sort(1).values
    body = tokens[:, 1:]
    kept = body.gather(1, places[..., None].expand(-1, -1, body.shape[2]))
    weights = scores.scatter(1, places, 0.0)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    rest = torch.einsum("nm,nmd->nd", weights.to(body.dtype), body)
    return torch.cat([tokens[:, :1], kept, rest[:, None]], 1), places
