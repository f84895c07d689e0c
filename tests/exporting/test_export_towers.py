"""Any vision transformer that ChineseCLIPModel can hold, held exactly; what it cannot hold, refused."""

from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import varied
from transformers import ChineseCLIPVisionConfig, ChineseCLIPVisionModel

from sacl_ds.errors import UserError
from sacl_ds.exporting.chinese_clip import VisionTower, tower_of, widened

MEAN, STD = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])


def vit(**arguments: object) -> torch.nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return varied(timm.create_model("vit_tiny_patch16_224", **{**small, **arguments}))


def held(tower: VisionTower, dtype: torch.dtype) -> ChineseCLIPVisionModel:
    config = ChineseCLIPVisionConfig(
        hidden_size=tower.width, intermediate_size=tower.hidden, num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads, image_size=tower.image_size, patch_size=tower.patch_size,
        hidden_act=tower.activation, layer_norm_eps=tower.eps,
    )  # fmt: skip
    model = ChineseCLIPVisionModel(config).eval().to(dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tower.tensors.items()})
    return model


def pixels(size: int) -> torch.Tensor:
    """Black, white, noise, and a flat grey, normalised."""
    g = torch.Generator().manual_seed(1)
    shape = (3, size, size)
    values = [torch.zeros(shape), torch.ones(shape), torch.rand(shape, generator=g), torch.full(shape, 0.5)]
    return (torch.stack(values) - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


@torch.no_grad()
def difference(model: torch.nn.Module, dtype: torch.dtype, wide: bool) -> float:
    """Largest, between values of unit features of 8 dimensions."""
    projection = torch.randn(8, model.embed_dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = model.to(dtype).forward_features(pixels(24).to(dtype))[:, 0] @ projection.to(dtype).T
    tower = tower_of(model, "here")
    if wide:
        tower, projection = widened(tower, projection, MEAN, STD)
    found = held(tower, dtype)(pixel_values=pixels(24).to(dtype)).pooler_output @ projection.to(dtype).T
    unit: Callable[[torch.Tensor], torch.Tensor] = lambda x: torch.nn.functional.normalize(x, dim=1)  # noqa: E731
    return float((unit(found) - unit(expected)).abs().max())


SHAPES = {
    "num_heads": st.sampled_from([1, 2, 3, 4]),
    "depth": st.integers(1, 4),
    "act_layer": st.sampled_from(["gelu", "quick_gelu", "gelu_tanh"]),
    "init_values": st.sampled_from([None, 0.3]),
    "qkv_bias": st.booleans(),
    "proj_bias": st.booleans(),
    "no_embed_class": st.booleans(),
    "mlp_ratio": st.sampled_from([2.0, 4.0]),
}


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries(SHAPES), st.booleans())
def test_the_same_function(arguments: dict, normed: bool) -> None:
    model = vit(**arguments, pre_norm=normed)
    # in float64: exact where the class has all that is needed, else what the wider tower leaves of the first norm
    assert difference(model, torch.float64, wide=not normed) < (1e-12 if normed else 1e-5)
    assert difference(model, torch.float32, wide=not normed) < 1e-5


@pytest.mark.parametrize("arguments", [{}, {"embed_dim": 64, "num_heads": 1}, {"embed_dim": 36, "num_heads": 4}])
def test_rounding_of_wider_towers(arguments: dict) -> None:
    """Also with heads of an odd number of values, and with all values in one."""
    assert difference(vit(**arguments), torch.float32, wide=True) < 5e-6


def test_the_wider_tower_needs_its_constants() -> None:
    """Without them the first norm changes everything: what is tested here would be seen."""
    model = vit()
    tower, projection = widened(tower_of(model, "here"), torch.eye(24), MEAN, STD)
    tower.tensors["embeddings.position_embedding.weight"][:, 24:] = 0
    tower.tensors["pre_layrnorm.weight"][:24] = 1
    with torch.no_grad():
        found = held(tower, torch.float32)(pixel_values=pixels(24)).pooler_output @ projection.float().T
        expected = model.float().forward_features(pixels(24))[:, 0]
    assert (found - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "arguments", "lacking"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}, "norm inside attention or MLP"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "norms other than LayerNorm"),
        ("vit_tiny_patch16_224", {"final_norm": False}, "norms other than LayerNorm"),
        ("vit_tiny_patch16_224", {"act_layer": "relu"}, "activation relu"),
        ("vit_tiny_patch16_224", {"img_size": (24, 48)}, "images or patches that are not square"),
        ("deit_tiny_distilled_patch16_224", {}, "image encoder like timm's VisionTransformerDistilled"),
        ("beit_base_patch16_224", {"depth": 1}, "image encoder like timm's Beit"),
        ("vit_small_plus_patch16_dinov3", {"depth": 1}, "image encoder like timm's"),
    ],
)
def test_what_the_class_cannot_hold(name: str, arguments: dict, lacking: str) -> None:
    model = timm.create_model(name, num_classes=0, **arguments)
    with pytest.raises(UserError, match=rf"here: transformers' ChineseCLIPModel has no {lacking}.*--to safetensors"):
        tower_of(model, "here")
