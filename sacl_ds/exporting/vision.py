"""Conversion of a timm vision transformer to the image tower of a ChineseCLIPModel: the same function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sacl_ds.errors import UserError
from sacl_ds.model.starts.image import activation

_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class VisionTower:
    """Converted image tower.

    tensors: float64, under ChineseCLIPVisionModel's names; the norm before the blocks is missing where timm's model has
    none. The other fields are what ChineseCLIPVisionConfig needs.
    """

    tensors: dict[str, Tensor]
    width: int
    heads: int
    layers: int
    hidden: int  # width between the two products of an MLP
    image_size: int  # pixels a side
    patch_size: int
    activation: str  # transformers' name
    eps: float  # of all norms

    @property
    def normed_first(self) -> bool:
        return "pre_layrnorm.weight" in self.tensors


def tower_of(vit: nn.Module, label: str) -> VisionTower:
    """Convert timm's vision transformer. Exact in real numbers; in float32 it rounds elsewhere than timm does.

    label: what error lines begin with. Raises UserError where ChineseCLIPVisionModel cannot compute what this one does.
    """
    if lacking := next(_lacking(vit), None):
        raise UserError(
            f"{label}: transformers' ChineseCLIPModel has no {lacking}; export with --to safetensors, which holds any "
            "model"
        )
    assert isinstance(vit, VisionTransformer)
    tensors = _embeddings(vit)
    if isinstance(vit.norm_pre, nn.LayerNorm):
        tensors |= _affine("pre_layrnorm", vit.norm_pre)
    for number, block in enumerate(vit.blocks):
        tensors |= {f"encoder.layers.{number}.{name}": tensor for name, tensor in _block(block).items()}
    tensors |= _affine("post_layernorm", vit.norm)
    first = vit.blocks[0]
    return VisionTower(
        tensors,
        width=vit.embed_dim,
        heads=first.attn.num_heads,
        layers=len(vit.blocks),
        hidden=first.mlp.fc1.out_features,
        image_size=vit.patch_embed.img_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        activation=_ACTIVATIONS[activation(vit)],
        eps=first.norm1.eps,
    )


def _lacking(vit: nn.Module) -> Iterator[str]:
    """Yield the features of the model that ChineseCLIPVisionModel lacks."""
    if type(vit) is not VisionTransformer:
        yield f"image encoder like timm's {type(vit).__name__}"
        return
    embed: Any = vit.patch_embed
    if type(embed) is not PatchEmbed or not isinstance(embed.norm, nn.Identity) or not embed.flatten:
        yield "patches embedded as in this one"
    if len(set(embed.img_size)) > 1 or len(set(embed.patch_size)) > 1:
        yield "images or patches that are not square"
    if vit.pos_embed is None:
        yield "image encoder without position embeddings"
    norms: list[Any] = [vit.norm] if isinstance(vit.norm_pre, nn.Identity) else [vit.norm_pre, vit.norm]
    blocks: Any = vit.blocks
    for block in blocks:
        yield from _lacking_in(block)
        norms += [block.norm1, block.norm2]
    if not all(isinstance(norm, nn.LayerNorm) and norm.elementwise_affine for norm in norms):
        yield "norms other than LayerNorm"
    elif len({norm.eps for norm in norms}) > 1:
        yield "norms of different eps"
    if activation(vit) not in _ACTIVATIONS:
        yield f"activation {activation(vit)}"


def _lacking_in(block: Any) -> Iterator[str]:
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        yield (
            f"block like timm's {type(block).__name__}"
            if type(block) is not Block
            else "attention or MLP as in this one"
        )
        return
    attention = block.attn
    plain = (attention.q_norm, attention.k_norm, attention.norm, block.mlp.norm)
    if not all(isinstance(norm, nn.Identity) for norm in plain):
        yield "norm inside attention or MLP"
    if getattr(attention, "gate", None) is not None:
        yield "gated attention"
    if attention.head_dim * attention.num_heads != attention.proj.out_features:
        yield "heads that do not make up the width"


def _embeddings(vit: VisionTransformer) -> dict[str, Tensor]:
    """Convert the embeddings; a bias of the patches is added to their positions."""
    cls, positions = _exact(vit.cls_token).view(-1), _exact(vit.pos_embed)[0]
    if vit.no_embed_class:
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    if vit.patch_embed.proj.bias is not None:
        positions = torch.cat([positions[:1], positions[1:] + _exact(vit.patch_embed.proj.bias)])
    return {
        "embeddings.class_embedding": cls,
        "embeddings.patch_embedding.weight": _exact(vit.patch_embed.proj.weight),
        "embeddings.position_embedding.weight": positions,
    }


def _block(block: Block) -> dict[str, Tensor]:
    made = _affine("layer_norm1", block.norm1) | _affine("layer_norm2", block.norm2)
    weights, biases = _exact(block.attn.qkv.weight).chunk(3), _bias(block.attn.qkv).chunk(3)
    for part, weight, bias in zip("qkv", weights, biases, strict=True):
        made |= {f"self_attn.{part}_proj.weight": weight, f"self_attn.{part}_proj.bias": bias}
    made |= {"mlp.fc1.weight": _exact(block.mlp.fc1.weight), "mlp.fc1.bias": _bias(block.mlp.fc1)}
    for name, linear, scale in (
        ("self_attn.out_proj", block.attn.proj, block.ls1),
        ("mlp.fc2", block.mlp.fc2, block.ls2),
    ):
        factor = (
            _exact(scale.gamma) if hasattr(scale, "gamma") else torch.ones(linear.out_features, dtype=torch.float64)
        )
        made |= {f"{name}.weight": factor[:, None] * _exact(linear.weight), f"{name}.bias": factor * _bias(linear)}
    return made


def _affine(name: str, norm: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": _exact(norm.weight), f"{name}.bias": _exact(norm.bias)}


def _bias(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.out_features, dtype=torch.float64) if linear.bias is None else _exact(linear.bias)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()
