"""Conversion of both towers to transformers' ChineseCLIPModel: the text's raw [CLS], projections without bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from sacl_ds import __version__
from sacl_ds.config import ModelConfig
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.exporting.vision import VisionTower, tower_of
from sacl_ds.exporting.widening import widened
from sacl_ds.model.sacl import MAX_LOGIT_SCALE, SaclModel
from sacl_ds.model.starts.quiet import quiet

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
