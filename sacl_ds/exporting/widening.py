"""Widening of an image tower without a norm before its blocks, to fit a class that always has one.

A LayerNorm cannot be the identity, but it can come as near as float32 can tell. The tower is given one more head, and
so as many more channels as a head has values. Two facts make these do no harm and some good:

* A LayerNorm subtracts the mean over channels, so what all that write into the residual stream may be centred over its
  channels without a difference, and so may the rows of what reads its output. Then, while the additional channels hold
  0, a norm over all channels differs from one over the real ones by the factor sqrt(real / all) alone, which its
  weights and eps take up.
* Before the first norm the additional channels hold ±C, from the position embeddings. They add up to 0, and beside
  their squares those of the token hardly count: every token is divided by nearly the same number, which the norm's
  weight multiplies by again. That weight is 0 for the additional channels, which hold 0 from there on.

What is left is a factor 1 - |token|² / (2 Σ C²) on each token. C follows from the longest token that pixels can make.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from sacl_ds.exporting.vision import VisionTower

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
    # the last norm's bias: no product behind it has one, but an additional channel can be 1
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
