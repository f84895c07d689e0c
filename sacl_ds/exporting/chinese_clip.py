"""Conversion of both towers to transformers' ChineseCLIPModel: the text's raw [CLS], projections without bias."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from sacl_ds import __version__
from sacl_ds.config import ModelConfig
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import MAX_LOGIT_SCALE, SaclModel
from sacl_ds.model.starts.image import activation
from sacl_ds.model.starts.pretrained import quiet

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


# the root of Σ C² over the longest token's length; with more, rounding of the sum over ±C begins to tell
_RATIO = 128.0
# what reads each norm's output; of the last norm the projection into the shared space
_READERS = {
    "layer_norm1": [f"self_attn.{part}_proj" for part in "qkv"],
    "layer_norm2": ["mlp.fc1"],
    "post_layernorm": [],
}


def widened(tower: VisionTower, projection: Tensor, mean: Tensor, std: Tensor) -> tuple[VisionTower, Tensor]:
    """Widen the tower by one head, with a first norm that changes no token by more than 1 / (2 · 128²) of it.

    projection: (d, width) of the tower's features into the shared space, returned for the wider one, float64. mean,
    std: (3,) of the pixels, of values in [0, 1].
    """
    old, added = tower.width, tower.width // tower.heads
    new = old + added
    share = old / new
    tensors = {name: _grown(name, tensor, added, share) for name, tensor in _folded(tower.tensors).items()}
    half, eps = added // 2, tower.eps * share
    constant = _power_of_two(_RATIO * _longest(tower, mean, std) / math.sqrt(2 * half))
    positions = tensors["embeddings.position_embedding.weight"]
    # halves, not in turn: then sums over every so-manieth channel, as vector units make them, cancel as well
    positions[:, old : old + half], positions[:, old + half : old + 2 * half] = constant, -constant
    weight = torch.zeros(new, dtype=torch.float64)
    weight[:old] = math.sqrt(constant**2 * 2 * half / new + eps)
    tensors |= {"pre_layrnorm.weight": weight, "pre_layrnorm.bias": torch.zeros(new, dtype=torch.float64)}
    # the last norm's bias: no product after it has one, but an additional channel can be 1
    last = tower.tensors["post_layernorm.weight"], tower.tensors["post_layernorm.bias"]
    tensors["post_layernorm.bias"][old] = 1.0
    made = _padded(_centred(projection.double() * last[0]), 1, added)
    made[:, old] = projection.double() @ last[1]
    return replace(tower, tensors=tensors, width=new, heads=tower.heads + 1, eps=eps), made


def _folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the norms' weights and biases into the linear layers that read them, and centre those layers' rows."""
    made = dict(tensors)
    for name, weight in tensors.items():
        norm, _, kind = name.rpartition(".")
        block, _, last = norm.rpartition(".")
        if kind != "weight" or last not in _READERS:
            continue
        bias = tensors[f"{norm}.bias"]
        for product in (f"{block}.{reader}" for reader in _READERS[last]):
            made[f"{product}.bias"] = tensors[f"{product}.bias"] + tensors[f"{product}.weight"] @ bias
            made[f"{product}.weight"] = _centred(tensors[f"{product}.weight"] * weight)
        made |= {name: torch.ones_like(weight), f"{norm}.bias": torch.zeros_like(bias)}
    return made


def _centred(weight: Tensor) -> Tensor:
    """Centre each row of (n, width): it then ignores the channels' mean, where rounding of a norm's mean ends up."""
    return weight - weight.mean(1, keepdim=True)


def _grown(name: str, tensor: Tensor, added: int, share: float) -> Tensor:
    """Widen one tensor: centred where it writes into the residual stream, scaled where it is a norm's."""
    place, _, kind = name.rpartition(".")
    last = place.rpartition(".")[2]
    if last in _READERS:
        return _padded(tensor * math.sqrt(share) if kind == "weight" else tensor, 0, added)
    if last in ("q_proj", "k_proj", "v_proj"):
        tensor = _padded(tensor, 0, added)
        return _padded(tensor, 1, added) if kind == "weight" else tensor
    if last == "fc1":
        return _padded(tensor, 1, added) if kind == "weight" else tensor
    channels = 1 if last == "position_embedding" else 0
    tensor = _padded(tensor - tensor.mean(channels, keepdim=True), channels, added)
    # of the heads that come in
    return _padded(tensor, 1, added) if name.endswith("out_proj.weight") else tensor


def _padded(tensor: Tensor, dim: int, added: int) -> Tensor:
    """Append zeros along one dimension."""
    shape = list(tensor.shape)
    shape[dim] = added
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _longest(tower: VisionTower, mean: Tensor, std: Tensor) -> float:
    """Bound the length of tokens before the blocks, for any pixels."""
    centred = {name: t - t.mean(1 if "position" in name else 0, keepdim=True) for name, t in tower.tensors.items()
               if name.startswith("embeddings.")}  # fmt: skip
    pixels = torch.maximum(mean, 1 - mean).double() / std.double()
    patch = math.sqrt(float(pixels.square().sum()) * tower.patch_size**2)
    weight = centred["embeddings.patch_embedding.weight"].flatten(1)
    positions = centred["embeddings.position_embedding.weight"]
    cls = float((centred["embeddings.class_embedding"] + positions[0]).norm())
    return max(cls, float(torch.linalg.matrix_norm(weight, 2)) * patch + float(positions[1:].norm(dim=1).max()))


def _power_of_two(value: float) -> float:
    """Return the next power of two above, which all kinds of floats hold exactly."""
    return 2.0 ** math.ceil(math.log2(value))


TOLERANCE = 1e-5  # between values of unit features
_TEXT = "text_encoder.bert."


def chinese_clip(model: SaclModel, config: ModelConfig, tokenizer: Tokenizer, label: str) -> ChineseCLIPModel:
    """Convert a trained model to transformers' ChineseCLIPModel, in float32 and eval mode.

    label: what error lines begin with. Raises UserError where the towers compute what ChineseCLIPModel cannot.
    """
    selection = config.patch_selection
    if selection.placement in ("tower", "published") and selection.guide != "text":
        raise UserError(
            f"{label}: transformers' ChineseCLIPModel has no patch selection, and model.patch_selection.guide="
            f"{selection.guide} leaves patches out of every image; export with --to safetensors"
        )
    plain = tower_of(model.image_encoder.vit, label)
    mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
    image = model.image_projection.weight.detach().double()
    tower, image = (plain, image) if plain.normed_first else widened(plain, image, mean, std)
    with quiet():
        made = ChineseCLIPModel(_config(model, config, tokenizer, tower))
    made.load_state_dict({name: tensor.float() for name, tensor in _tensors(model, tower, image).items()})
    return made.eval()


def _config(model: SaclModel, config: ModelConfig, tokenizer: Tokenizer, tower: VisionTower) -> ChineseCLIPConfig:
    bert = model.text_encoder.bert.config
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "layer_norm_eps", "type_vocab_size", "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )  # fmt: skip
    vision = {
        "hidden_size": tower.width,
        "intermediate_size": tower.hidden,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.eps,
        "projection_dim": config.embed_dim,
    }
    text = {name: getattr(bert, name) for name in kept} | {"pad_token_id": tokenizer.pad_id}
    said = {"version": __version__, "image_encoder": config.image_encoder, "image_width": model.image_encoder.width}
    return ChineseCLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=config.embed_dim,
        logit_scale_init_value=_log_scale(model).item(),
        sacl_ds=said,
    )


def _tensors(model: SaclModel, tower: VisionTower, image: Tensor) -> dict[str, Tensor]:
    state = model.state_dict()
    text = {name.removeprefix(_TEXT): tensor for name, tensor in state.items() if name.startswith(_TEXT)}
    return {
        **{f"vision_model.{name}": tensor for name, tensor in tower.tensors.items()},
        **{f"text_model.{name}": tensor for name, tensor in text.items()},
        "visual_projection.weight": image,
        "text_projection.weight": model.text_projection.weight.detach(),
        "logit_scale": _log_scale(model),
    }


def _log_scale(model: SaclModel) -> Tensor:
    """Return the 0-dim log of the logit scale, clamped as the model clamps it."""
    return model.logit_scale.log_scale.detach().float().clamp(0.0, math.log(MAX_LOGIT_SCALE)).squeeze(0)


@torch.no_grad()
def largest_difference(model: SaclModel, made: ChineseCLIPModel, config: ModelConfig, tokenizer: Tokenizer) -> float:
    """Return the largest difference between the unit features of both models on fixed random pictures and texts."""
    g = torch.Generator().manual_seed(0)
    size = config.image_size
    coarse = torch.rand(4, 3, 4, 4, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    noise = torch.rand(2, 3, size, size, generator=g)
    ends = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    images = (255 * torch.cat([smooth, noise, ends])).to(torch.uint8)
    ids = torch.randint(tokenizer.size, (8, config.max_tokens), generator=g)
    mask = (torch.arange(config.max_tokens) < torch.arange(2, 10)[:, None]).long()
    shape = (1, 3, 1, 1)
    pixels = (images / 255 - torch.tensor(config.image_mean).view(shape)) / torch.tensor(config.image_std).view(shape)
    theirs = (
        made.get_image_features(pixel_values=pixels).pooler_output,
        made.get_text_features(input_ids=ids, attention_mask=mask).pooler_output,
    )
    ours = model.encode_image(images)[1], model.encode_text(ids, mask)[1]
    return max(
        float((own - torch.nn.functional.normalize(other, dim=1)).abs().max())
        for own, other in zip(ours, theirs, strict=True)
    )


def require_equal(difference: float, label: str) -> None:
    """Raises UserError where the two do not compute the same features."""
    if not difference <= TOLERANCE:  # nor NaN
        raise UserError(
            f"{label}: as ChineseCLIPModel its features differ by {difference:.1g}, more than {TOLERANCE:g}; export "
            "with --to safetensors"
        )
