"""Image encoder: a timm vision transformer with a [CLS] token; uint8 pixels in, tokens out, all or selected ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sacl_ds.config import PatchSelectionConfig
from sacl_ds.errors import CannotLoad, UserError
from sacl_ds.model.indexing import take
from sacl_ds.model.patch_selection import Scored, attention_scores, kept_count, select, token_scores
from sacl_ds.model.placing import require_finite, require_none_lacking

_ALL = PatchSelectionConfig()


class ImageStates(NamedTuple):
    """Output of the image encoder for b images. A tuple, since ZeRO 3 looks for tensors in those alone.

    tokens: (b, P, width), [CLS] first; of them come the image's features. scored: where a text that is known later
    begins to choose among patches (`ImageEncoder.guided`); None where nothing is left to choose. places: (b, kept)
    int64, the patches that are among `tokens`, where some are not.
    """

    tokens: Tensor
    scored: Scored | None = None
    places: Tensor | None = None

    def at(self, images: Tensor) -> ImageStates:
        """Select the states of the images at these (n,) indices; with `scored`, patches are not yet selected."""
        if self.scored is None:
            return ImageStates(take(self.tokens, images), None, None if self.places is None else self.places[images])
        tokens, keys, query = (take(x, images) for x in (self.scored.tokens, self.scored.keys, self.scored.query))
        return ImageStates(tokens, Scored(tokens, keys, query, self.scored.fused))


class Choice(NamedTuple):
    """Record of one patch selection.

    layer: from 1. among, places: (n, patches) and (n, kept) int64, the patches chosen from and those kept, by their
    index in the picture. scores: float, rows sum to 1: (n, patches), or in a later selection (n, patches + 1), the last
    being the fused token's.
    """

    layer: int
    among: Tensor
    scores: Tensor
    places: Tensor


class ImageEncoder(nn.Module):
    """Image encoder, (b, 3, H, W) uint8 -> `ImageStates`. Pixels are normalised here, on the device."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        pretrained: bool = False,
        arguments: dict[str, Any] | None = None,
        selection: PatchSelectionConfig = _ALL,
    ) -> None:
        super().__init__()
        try:
            self.vit = timm.create_model(name, img_size=image_size, num_classes=0, **(arguments or {}))
            if pretrained:
                _load_published(self.vit, f"model.image_encoder={name}")
        except UserError:
            raise
        except OSError as error:  # what fetching weights raises
            raise CannotLoad("model.image_encoder", name.removeprefix("local-dir:"), error) from None
        except Exception as error:  # of arguments that the architecture does not take
            raise UserError(f"model.image_encoder={name!r}: {error}") from error
        if getattr(self.vit, "num_prefix_tokens", 0) != 1 or not hasattr(self.vit, "forward_features"):
            raise UserError(f"model.image_encoder={name!r}: choose a timm vision transformer with one [CLS] token")
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.width: int = self.vit.num_features
        self.selection = selection
        self.layers = _selecting_layers(self.vit, name, selection)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Set whether backward recomputes each block's activations instead of storing them."""
        self.vit.set_grad_checkpointing(on)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each block; halves of one between which patches are selected run as they are."""
        for block in getattr(self.vit, "blocks", ()):
            block.compile(backend=backend)

    def forward(self, images: Tensor, guide: Tensor | None = None, record: list[Choice] | None = None) -> ImageStates:
        """Encode images.

        guide: (b, width) [CLS] states of texts to choose the patches by, already here.

        With placement `tower` or `published`, and for `output` too where it is given; without a guide no text takes
        part in the result. record: gets every selection that is made, in order.
        """
        pixels = (images - self.mean) / self.std
        if not self.layers:
            return ImageStates(self.vit.forward_features(pixels))
        vit, first = self.vit, self.layers[0]
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
        """Select the image tokens that n texts see, where selection is still open.

        guide: (n, width), [CLS] states of the texts. images: (n,) places in the batch, None for one text each, in
        order. Nothing is left to choose in what is returned.
        """
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
        vit, rate = self.vit, self.selection.keep_rate
        places: Tensor | None = None
        last = self.layers[-1]

        def chosen(scored: Scored, number: int) -> Tensor:
            nonlocal places
            keep, scores = kept_count(scored.patches, rate), self._scores(scored, vit.blocks[number - 1].attn, guide)
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
        """Score the patches by the layer's attention, (n, patches + fused); each row sums to 1."""
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
        """Run the attention half of a block; the result holds what a selection scores by."""
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
        """(n, m, width) -> the same behind the block's attention, (n, heads, m, head width) keys, the query of [CLS].

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


def _load_published(vit: nn.Module, label: str) -> None:
    """Load timm's weights of that model, all of them: without a classifier timm leaves at chance what they lack."""
    lacking: list[str] = []
    hook = vit.register_load_state_dict_post_hook(lambda _, names: lacking.extend(names.missing_keys))
    filter_fn = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if "flexi" in label and filter_fn:  # as timm does
        filter_fn = partial(filter_fn, interpolation="bilinear", antialias=False)
    timm.models.load_pretrained(vit, num_classes=0, filter_fn=filter_fn, strict=False)
    hook.remove()
    require_none_lacking(lacking, label)
    require_finite(vit.state_dict(), label)


def _selecting_layers(vit: nn.Module, name: str, selection: PatchSelectionConfig) -> list[int]:
    """Return the layers, from 1, at which patches are scored. Raises UserError where this transformer cannot select."""
    if selection.placement == "none":
        return []
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
