"""Text-guided patch selection (TRIPS: Jiang et al., EMNLP 2022): fewer image tokens, chosen by what the text asks for.

At a layer of the vision transformer every patch x_j gets a score from a guide, the rest of the layer sees the
`keep_rate` best patches in their order, and one token more: the mean of all others, weighted by their scores. The guide
is the text's [CLS] state, put through that layer's own query weights (or the image's [CLS], or chance), so that no
parameter is added and a model has the same state dict with and without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sacl_ds.config import PatchSelectionConfig
from sacl_ds.data.batch import take
from sacl_ds.errors import UserError
from sacl_ds.model.vision import ImageEncoder, ImageStates


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

    def at(self, images: Tensor) -> Scored:
        """Select the images at these (n,) indices."""
        return Scored(take(self.tokens, images), take(self.keys, images), take(self.query, images), self.fused)


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


class Choice(NamedTuple):
    """One selection. scores: float, rows sum to 1. What a later one chooses from has a last score, the fused token's.

    layer: from 1. among, places: (n, patches) and (n, kept) int64, the patches chosen from and those kept, by their
    place in the picture. scores: (n, patches) or (n, patches + 1).
    """

    layer: int
    among: Tensor
    scores: Tensor
    places: Tensor


class SelectingEncoder(ImageEncoder):
    """An ImageEncoder that selects patches, by `selection`. Its blocks are timm's; its state dict is ImageEncoder's.

    Raises UserError where the transformer of that name cannot select.
    """

    def __init__(self, name: str, *arguments: Any, selection: PatchSelectionConfig, **further: Any) -> None:
        super().__init__(name, *arguments, **further)
        self.selection = selection
        self.layers = _selecting_layers(self.vit, name, selection)

    def forward(self, images: Tensor, guide: Tensor | None = None, record: list[Choice] | None = None) -> ImageStates:
        """guide: (b, width) [CLS] states of texts to choose the patches by, already here.

        With placement `tower` or `published`, and for `output` too where it is given; without a guide no text takes
        part in the result. record: gets every selection that is made, in order.
        """
        pixels, vit, first = self._normalised(images), self.vit, self.layers[0]
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
        for block in vit.blocks[: first - 1]:
            x = self._run(block, x)
        scored = self._attended(vit.blocks[first - 1], x, fused=False)
        in_tower = self.selection.placement != "output"
        if in_tower and (guide is not None or self.selection.guide != "text"):
            tokens, places = self._selected(scored, guide, record)
            return ImageStates(tokens, None, places)
        x = self._run(_second_half(vit.blocks[first - 1]), scored.tokens)
        for block in vit.blocks[first:]:
            x = self._run(block, x)
        tokens = vit.norm(x)
        if self.selection.placement == "published":
            return ImageStates(tokens)
        states = ImageStates(tokens, scored if in_tower else scored._replace(tokens=tokens))
        return states if guide is None else self.guided(states, guide, record=record)

    def guided(
        self, states: ImageStates, guide: Tensor, images: Tensor | None = None, record: list[Choice] | None = None
    ) -> ImageStates:
        """record: gets every selection that is made, in order."""
        if images is not None:
            states = states.at(images)
        if states.scored is None:
            return states
        tokens, places = self._selected(states.scored, guide, record)
        return ImageStates(tokens, None, places)

    def _selected(
        self, scored: Scored, guide: Tensor | None, record: list[Choice] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Select patches and run the remaining blocks, given the first selecting layer's attention.

        Returns (n, P', width) and the indices of the patches kept.
        """
        vit = self.vit
        places: Tensor | None = None
        last = self.layers[-1]

        def chosen(scored: Scored, number: int) -> Tensor:
            nonlocal places
            keep = self.selection.kept_count(scored.patches)
            scores = self._scores(scored, vit.blocks[number - 1].attn, guide)
            tokens, best = select(scored.tokens, scores, keep, scored.fused)
            before, places = places, best if places is None else places.gather(1, best)
            if record is not None:
                everywhere = torch.arange(scored.patches, device=best.device).expand(len(best), -1)
                record.append(Choice(number, everywhere if before is None else before, scores, places))
            return tokens

        first = self.layers[0]
        x = chosen(scored, first)
        if self.selection.placement != "output":
            x = self._run(_second_half(vit.blocks[first - 1]), x)
            for number, block in enumerate(vit.blocks[first:], first + 1):
                if number > last or number not in self.layers:
                    x = self._run(block, x)
                    continue
                fused = x.shape[1] > 1 + (scored.patches if places is None else places.shape[1])
                x = self._run(_second_half(block), chosen(self._attended(block, x, fused), number))
            x = vit.norm(x)
        assert places is not None
        return x, places

    def _scores(self, scored: Scored, attention: Attention, guide: Tensor | None) -> Tensor:
        """(n, patches + fused) of the layer with this attention, each row sums to 1."""
        settings, keys = self.selection, scored.keys[:, :, 1:]
        if settings.guide == "random":
            return torch.rand(len(keys), keys.shape[2], device=keys.device).softmax(1)
        if settings.guide == "cls":
            return attention_scores(scored.query, keys)
        assert guide is not None
        # through the module, whose weights ZeRO 3 gathers for its forward pass; keys and values of it are not used
        query = attention.qkv(guide)[:, : attention.num_heads * attention.head_dim]
        query = attention.q_norm(query.unflatten(1, (attention.num_heads, attention.head_dim)))
        if settings.score == "keys":
            return attention_scores(query, keys)
        return token_scores(query.flatten(1), scored.tokens[:, 1:])

    def _attended(self, block: Block, x: Tensor, fused: bool) -> Scored:
        """The attention half of a block, with what a selection scores by."""
        tokens, keys, query = self._run(_FirstHalf(block), x)
        return Scored(tokens, keys, query, fused)

    def _run(self, part: Callable[[Tensor], Any], x: Tensor) -> Any:
        if self.vit.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, x, use_reentrant=False)
        return part(x)


@dataclass(frozen=True)
class _FirstHalf:
    block: Block

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, m, width) -> the same after the block's attention, (n, heads, m, head width) keys, the query of [CLS].

        What timm's Attention computes, with the keys in hand.
        """
        block, attention = self.block, self.block.attn
        normed = block.norm1(x)
        gate = attention.gate(normed).sigmoid() if getattr(attention, "gate", None) is not None else None
        split = attention.qkv(normed).unflatten(2, (3, attention.num_heads, attention.head_dim))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = attention.q_norm(query), attention.k_norm(key)
        dropout = attention.attn_drop.p if attention.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
        mixed = attention.proj_drop(attention.proj(mixed if gate is None else mixed * gate))
        return x + block.drop_path1(block.ls1(mixed)), key, query[:, :, 0]


def _second_half(block: Block) -> Callable[[Tensor], Tensor]:
    return lambda x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _selecting_layers(vit: nn.Module, name: str, selection: PatchSelectionConfig) -> list[int]:
    """Layers, from 1, at which patches are scored. Raises UserError where this transformer cannot select."""
    here = f"model.patch_selection with model.image_encoder={name!r}"
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"{here}: {type(vit).__name__} cannot select; choose a VisionTransformer of timm")
    depth = len(vit.blocks)
    layers = [depth] if selection.placement == "output" else sorted(set(selection.layers))
    if layers[-1] > depth:
        raise UserError(
            f"{here}: no layer {layers[-1]} in its {depth}; set model.patch_selection.layers, counted from 1, e.g. "
            f"[{max(1, depth // 2)}]"
        )
    for number in layers:
        block = vit.blocks[number - 1]
        if type(block) is not Block or type(block.attn) is not Attention:
            raise UserError(f"{here}: its {type(block).__name__}s cannot select; choose one with timm's plain Block")
    return layers
