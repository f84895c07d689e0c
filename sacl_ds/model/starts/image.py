"""Weights of the image encoder from the layouts of CLIP (OpenAI's and open_clip's, transformers') and of timm."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from transformers import ChineseCLIPModel, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from sacl_ds.errors import UserError
from sacl_ds.model.placing import place, require_parts, require_shapes
from sacl_ds.model.starts.pretrained import load_pretrained, load_settings
from sacl_ds.model.starts.report import SourceReport
from sacl_ds.model.starts.weights_file import read_weights
from sacl_ds.model.vision import ImageEncoder

PART = "image_encoder.vit."
SETTING = "model.image_weights"
_WHOLE = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModel, "chinese_clip": ChineseCLIPModel}
_MOMENTUM = "_m."  # ends the name of a tower's moving average
_CLIP_HEAD = 64  # values a head in every tower of OpenAI's
_ACTIVATIONS = {"quickgelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_TRANSFORMERS = {  # parts of names -> timm's
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm": "norm_pre",
    "post_layernorm": "norm",
    "encoder.layers": "blocks",
    "self_attn.out_proj": "attn.proj",
    "layer_norm": "norm",
}


@dataclass(frozen=True)
class Computation:
    """Preprocessing and activation that weights were trained with, as far as their source says."""

    activation: str | None = None  # quick_gelu, gelu, gelu_tanh
    heads: int | None = None
    eps: float | None = None
    clip: bool = False  # OpenAI's or transformers' CLIP, of which there are both activations


def load_image_weights(encoder: ImageEncoder, name: str, encoder_name: str) -> SourceReport:
    """Copy weights into the image encoder: a file, or the folder or hub name of a CLIP of transformers.

    encoder_name: model.image_encoder, for error lines. Raises UserError where they cannot be read, are of another size
    or were trained with another activation.
    """
    label = f"{SETTING}={name}"
    path = Path(name)
    if path.is_file() or path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        file = read_weights(name, SETTING)
        state, computation = file.tensors, Computation("quick_gelu" if file.torchscript else None)
    else:
        state, computation = _of_transformers(name)
    found = image_tower(state)
    if found is None:
        first = next(iter(state), None)
        raise UserError(
            f"{label}: no image encoder with class token in its {len(state)} tensors (first {first!r}); "
            "give a CLIP of OpenAI, open_clip or transformers with a vision transformer, or weights of timm"
        )
    tensors, left_over, layout = found
    if layout != "timm":
        eps = 1e-5 if computation.eps is None else computation.eps
        computation = Computation(computation.activation, computation.heads, eps, clip=True)
    loaded, unused, notes = load_vit(encoder.vit, tensors, computation, label, encoder_name)
    return SourceReport(
        SETTING, name, ("image_encoder.",), [PART + n for n in loaded], left_over + unused, [*state, *unused], notes
    )


def image_tower(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], str] | None:
    """Find the vision transformer in a state dict: (its tensors, names of all others, layout), or None.

    layout: 'openai' (names begin with 'visual.'), 'transformers' or 'timm' (both in timm's names).
    """
    for layout, anchor, other in (
        ("openai", "class_embedding", "conv1.weight"),
        ("transformers", "embeddings.class_embedding", "embeddings.patch_embedding.weight"),
        ("timm", "cls_token", "patch_embed.proj.weight"),
    ):
        found = (name.removesuffix(anchor) for name in state if name.endswith(anchor))
        ends = (end for end in found if not end.endswith(_MOMENTUM))
        prefix = min((end for end in ends if end + other in state), key=len, default=None)
        if prefix is None:
            continue
        inside = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        if layout == "openai":
            inside.pop(f"{prefix}proj", None)  # into CLIP's shared space
            tensors = {f"visual.{name.removeprefix(prefix)}": tensor for name, tensor in inside.items()}
        else:
            tensors = {name.removeprefix(prefix): tensor for name, tensor in inside.items()}
            tensors.pop("embeddings.position_ids", None)
            if layout == "transformers":
                if not prefix:
                    tensors = {n: t for n, t in tensors.items() if re.match(r"embeddings|encoder|pre_|post_", n)}
                    inside = {n: state[n] for n in tensors}
                tensors = _transformers_to_timm(tensors)
        return tensors, [name for name in state if name not in inside], layout
    return None


def load_vit(
    vit: nn.Module, tensors: Mapping[str, Tensor], computation: Computation, label: str, encoder_name: str
) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Copy a tower of `image_tower` into timm's model, its position embeddings interpolated to the model's grid.

    Returns (names loaded, names left over, notes). Raises UserError where sizes, heads or the activation differ.
    """
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise UserError(
            f"{label}: model.image_encoder={encoder_name} is no plain vision transformer; choose a vit_ of timm"
        )
    notes = _differences(vit, computation, label, encoder_name)
    tensors, interpolated = _fitted(vit, tensors, label)
    loaded, unused = place(vit, tensors, label)
    require_parts(vit, loaded, label, new=None if computation.clip else "norm_pre.")
    missing = [name for name in vit.state_dict() if name not in tensors]
    if interpolated:
        notes.append(interpolated)
    if unused_norm := [name for name in unused if name.startswith("norm_pre")]:
        notes.append(
            f"the weights have a norm before the blocks ({unused_norm[0]}) and model.image_encoder={encoder_name} has "
            "none: it computes something else; timm's vit_..._clip_... have it"
        )
    if any(name.startswith("norm_pre") for name in missing):
        notes.append(
            f"model.image_encoder={encoder_name} has a norm before the blocks and the weights have none: it is new and "
            "changes what they compute; timm's vit_... without _clip_ have none"
        )
    return loaded, unused, tuple(notes)


def _fitted(vit: VisionTransformer, tensors: Mapping[str, Tensor], label: str) -> tuple[dict[str, Tensor], str | None]:
    """Convert to timm's names and the model's shapes; also return what is to be said on position embeddings."""
    blocks = {int(m[1]) for name in tensors if (m := re.search(r"blocks\.(\d+)\.", name))}
    patches = next(t for n, t in tensors.items() if n.endswith(("conv1.weight", "patch_embed.proj.weight")))
    positions = next((t for n, t in tensors.items() if n.endswith(("positional_embedding", "pos_embed"))), None)
    remedy = (
        f"choose model.image_encoder and model.image_encoder_arguments as the weights are: width {patches.shape[0]}, "
        f"{len(blocks)} blocks, patches of {patches.shape[-1]} pixels"
    )
    if len(blocks) != len(vit.blocks):
        raise UserError(f"{label}: {len(blocks)} blocks there and {len(vit.blocks)} in the model; {remedy}")
    if patches.shape != vit.patch_embed.proj.weight.shape:  # timm would resample patches of another size
        require_shapes(vit, {"patch_embed.proj.weight": patches}, label, remedy)
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    old = new = vit.pos_embed.shape[1] - prefix
    if positions is not None:
        old = positions.shape[-2] - prefix
        if old < 1 or math.isqrt(old) ** 2 != old:
            raise UserError(
                f"{label}: position embeddings of {positions.shape[-2]} tokens are not [CLS] and a square of patches; "
                "give weights of square images with one class token"
            )
    fitted = checkpoint_filter_fn({name: tensor.float() for name, tensor in tensors.items()}, vit)
    require_shapes(vit, fitted, label, remedy)
    if old == new:
        return fitted, None
    grid = " × ".join(map(str, vit.patch_embed.grid_size))
    side = math.isqrt(old)
    return fitted, f"position embeddings interpolated from {side} × {side} patches to {grid}"


def _differences(vit: VisionTransformer, computation: Computation, label: str, encoder_name: str) -> list[str]:
    """Raises UserError where activation or heads are known to differ; notes on what only may."""
    there, here, notes = computation.activation, activation(vit), []
    if there is not None and there != here:
        raise UserError(
            f"{label}: trained with {there}, and model.image_encoder={encoder_name} computes {here}; "
            f"set {_way_to(there, encoder_name)}"
        )
    if there is None and computation.clip:
        other = "gelu" if here == "quick_gelu" else "quick_gelu"
        notes.append(
            f"the file does not say its activation; the model has {here}. OpenAI's CLIPs have quick_gelu, most of "
            f"open_clip's gelu: if these have {other}, set {_way_to(other, encoder_name)}"
        )
    heads, width = vit.blocks[0].attn.num_heads, vit.embed_dim
    if computation.heads is not None and computation.heads != heads:
        raise UserError(
            f"{label}: {computation.heads} heads there and {heads} in the model; "
            f"set model.image_encoder_arguments.num_heads={computation.heads}"
        )
    if computation.heads is None and computation.clip and heads * _CLIP_HEAD != width:
        notes.append(
            f"heads of {width // heads} values in the model; the file does not say its own, CLIP's have {_CLIP_HEAD}"
        )
    eps = getattr(vit.blocks[0].norm1, "eps", None)
    if computation.eps is not None and eps is not None and computation.eps != eps:
        notes.append(f"norms have eps {computation.eps:g} there and {eps:g} in the model")
    return notes


def activation(vit: nn.Module) -> str:
    """Name the activation: quick_gelu, gelu, gelu_tanh, or the class of the first block's."""
    act: Any = vit.blocks[0].mlp.act  # type: ignore[union-attr, index]
    name = type(act).__name__.lower()
    tanh = name == "gelutanh" or getattr(act, "approximate", "none") == "tanh"
    return "gelu_tanh" if tanh else _ACTIVATIONS.get(name, name)


def _way_to(wanted: str, encoder_name: str) -> str:
    """Name the setting that gives the model the wanted activation."""
    bare = encoder_name.partition(".")[0]
    other = bare.replace("_quickgelu", "") if wanted == "gelu" else bare.replace("_clip_", "_clip_quickgelu_")
    if wanted in ("gelu", "quick_gelu") and other != bare and timm.is_model(other):
        return f"model.image_encoder={other}"
    return f"model.image_encoder_arguments.act_layer={wanted}"


def _of_transformers(name: str) -> tuple[dict[str, Tensor], Computation]:
    """Read all tensors of a saved CLIP, and its preprocessing and activation."""
    written = Path(name) / "config.json"
    if written.is_file() and re.search(r'"architecture"\s*:', written.read_text(errors="replace")):
        raise UserError(f"{SETTING}={name}: a folder of timm's; give its model.safetensors")
    config = load_settings(name, SETTING)
    if config.model_type not in _WHOLE:
        raise UserError(
            f"{SETTING}={name} holds a model of type {config.model_type!r}; give a CLIP, or a file of weights"
        )
    _require_narrow(config, name)
    whole = _WHOLE[config.model_type]
    if "CLIPVisionModelWithProjection" in (config.architectures or ()):
        whole = CLIPVisionModelWithProjection
    model, missing, unexpected = load_pretrained(whole, name, SETTING)
    vision = getattr(config, "vision_config", config)
    act = str(vision.hidden_act)
    computation = Computation(_ACTIVATIONS.get(act, act), vision.num_attention_heads, vision.layer_norm_eps)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in missing}
    return state | {name: torch.empty(0) for name in unexpected}, computation


def _require_narrow(config: Any, name: str) -> None:
    """Raises UserError for an export whose image tower had to be given a head of zeros (`sacl_ds.exporting`)."""
    width = (getattr(config, "sacl_ds", None) or {}).get("image_width")
    if width is not None and width != config.vision_config.hidden_size:
        raise UserError(
            f"{SETTING}={name}: an export for transformers, whose image tower was made wider for it; start from the "
            "run, or from an export of it with --to safetensors, as model.start"
        )


def _transformers_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert to timm's names and shapes; query, key and value in one matrix."""
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        if "self_attn.q_proj" in name:
            parts = [state.get(name.replace("q_proj", f"{part}_proj"), torch.empty(0)) for part in "qkv"]
            tensor, name = torch.cat(parts), name.replace("self_attn.q_proj", "attn.qkv")
        for old, new in _TRANSFORMERS.items():
            name = name.replace(old, new)
        made[name] = {"cls_token": tensor.view(1, 1, -1), "pos_embed": tensor[None]}.get(name, tensor)
    return made
