"""Initialisation of the whole model: from a checkpoint in ALBEF's layout, or from a finished run."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from sacl_ds.config import ModelConfig
from sacl_ds.errors import UserError
from sacl_ds.files import require_unchanged
from sacl_ds.model.placing import place, require_parts, require_shapes
from sacl_ds.model.sacl import MAX_LOGIT_SCALE, SaclModel
from sacl_ds.model.saved import CONFIG, TOKENIZER, WEIGHTS, finished_weights, saved_model_config
from sacl_ds.model.starts.image import PART, Computation, image_tower, load_vit
from sacl_ds.model.starts.report import SourceReport
from sacl_ds.model.starts.text import WORDS, bert_tensors
from sacl_ds.model.starts.weights_file import read_weights

SETTING = "model.start"
_HEADS = {
    "vision_proj.weight": "image_projection.weight",
    "text_proj.weight": "text_projection.weight",
    "itm_head.weight": "matching_head.weight",
    "itm_head.bias": "matching_head.bias",
}
_ALBEF = Computation(activation="gelu", eps=1e-6)  # of its image encoder
_POSITIONS = "text_encoder.bert.embeddings.position_embeddings.weight"
_ENCODERS = ("image_encoder.", "text_encoder.", "fusion_encoder.")
_SIZES = ("text_width", "text_heads", "text_layers", "fusion_layers", "embed_dim")


def run_folder(start: str) -> Path | None:
    """Return the finished run that model.start names, or None for a checkpoint file. Raises UserError for neither."""
    path = Path(start)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{SETTING}={start}: no such file or folder; correct the path")
        return None
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (path / name).exists():
            raise UserError(f"{SETTING}={start}: no {name} there; give the directory of a finished run")
    return path


def run_positions(folder: Path) -> int:
    """Return the number of text positions of a finished run's model. Raises UserError."""
    require_unchanged(folder, f"{SETTING}={folder}", WEIGHTS)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return int(file.get_slice(_POSITIONS).get_shape()[0])
    except (OSError, SafetensorError, IndexError) as error:  # IndexError: positions that are a number
        raise UserError(f"{SETTING}={folder}: {WEIGHTS} cannot be read: {error}") from None


def load_start(model: SaclModel, config: ModelConfig) -> SourceReport:
    """Copy model.start into the model. Raises UserError where it cannot be read or is of another size."""
    assert config.start is not None
    folder = run_folder(config.start)
    return _load_albef(model, config, config.start) if folder is None else _load_run(model, config, folder)


def _load_albef(model: SaclModel, config: ModelConfig, start: str) -> SourceReport:
    """Load ALBEF's checkpoint: pre-trained (text_encoder.bert...) or fine-tuned for retrieval (text_encoder...)."""
    label = f"{SETTING}={start}"
    state = read_weights(start, SETTING).tensors
    if any(name.startswith(PART) for name in state):
        raise UserError(f"{label}: weights of a run of ours; give the directory that they are in")
    vision = {name: tensor for name, tensor in state.items() if name.startswith("visual_encoder.")}
    text = {_bert_name(name): tensor for name, tensor in state.items() if name.startswith("text_encoder.")}
    tower = image_tower(vision)
    if tower is None or WORDS not in text:
        raise UserError(
            f"{label}: no ALBEF in it, among {len(state)} tensors from {next(iter(state))!r} on; "
            "give its visual_encoder.* and text_encoder.*, or CLIP's weights as model.image_weights"
        )
    heads = {own: state[name] for name, own in _HEADS.items() if name in state}
    if "temp" in state:
        heads["logit_scale.log_scale"] = _log_scale(state["temp"], label)
    bert, left_text = bert_tensors(text, model, label)
    shared = state.get("vision_proj.weight")
    dim = f"set model.embed_dim={shared.shape[0]}" if shared is not None else "choose its sizes"
    vit_loaded, vit_left, notes = load_vit(model.image_encoder.vit, tower[0], _ALBEF, label, config.image_encoder)
    require_shapes(model, heads, label, dim)
    loaded, _ = place(model, {**bert, **heads}, label)
    require_parts(model, loaded, label, ("text_encoder.", "fusion_encoder."))
    original = {_bert_name(name): name for name in state if name.startswith("text_encoder.")}
    used = {*vision, *original.values(), "temp", *_HEADS}
    left = [f"visual_encoder.{name}" for name in vit_left] + [original[name] for name in left_text if name in original]
    left += [name for name in state if name not in used]
    if "vision_proj.bias" in state:
        notes = (*notes, "projections have no bias here: features differ from ALBEF's by what its biases added")
    return SourceReport(SETTING, start, ("",), [PART + n for n in vit_loaded] + loaded, left, state.keys(), notes)


def _log_scale(temperature: Tensor, label: str) -> Tensor:
    """Return (1,) log of 1 / temperature, clamped to the model's bounds. Raises UserError where that is no positive
    number."""
    if temperature.numel() != 1 or not 0 < float(temperature) < math.inf:
        raise UserError(f"{label}: its temp is {temperature.tolist()}, no temperature; give weights that are whole")
    return -torch.log(temperature.float().view(1)).clamp(-math.log(MAX_LOGIT_SCALE), 0.0)


def _bert_name(name: str) -> str:
    return name.removeprefix("text_encoder.").removeprefix("bert.")


def _load_run(model: SaclModel, config: ModelConfig, folder: Path) -> SourceReport:
    label = f"{SETTING}={folder}"
    return place_run(model, config, folder, finished_weights(folder, label), label)


def place_run(
    model: SaclModel, config: ModelConfig, folder: Path, state: dict[str, Tensor], label: str
) -> SourceReport:
    """Copy the weights `state` of the run in `folder` into the model, with image positions for its resolution.

    label: what error lines call their source. Raises UserError where they are of a model of another size.
    """
    theirs = saved_model_config(folder)
    for key in _SIZES:
        there, here = getattr(theirs, key), getattr(config, key)
        if there != here:
            raise UserError(f"{label}: a model with model.{key}={there}, not {here}; set model.{key}={there}")
    notes = []
    for key in ("image_encoder", "image_encoder_arguments", "image_mean", "image_std"):
        there, here = getattr(theirs, key), getattr(config, key)
        if there != here:
            notes.append(f"that run has model.{key}={there}, this one {here}")
    state, interpolated = _resampled(model, state)
    require_shapes(model, state, label, f"set model.image_encoder and model.image_size as in {folder / CONFIG}")
    loaded, left_over = place(model, state, label)
    require_parts(model, loaded, label, _ENCODERS)
    return SourceReport(
        label.partition("=")[0], str(folder), ("",), loaded, left_over, state.keys(), (*notes, *interpolated)
    )


def _resampled(model: SaclModel, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Interpolate the image position embeddings to the model's resolution."""
    name, vit = f"{PART}pos_embed", model.image_encoder.vit
    old = state.get(name)
    own = getattr(vit, "pos_embed", None)
    if old is None or own is None or old.shape == own.shape or old.shape[-1] != own.shape[-1]:
        return state, []
    prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
    grid = list(vit.patch_embed.grid_size)
    side = math.isqrt(old.shape[1] - prefix)
    made = resample_abs_pos_embed(old, new_size=grid, num_prefix_tokens=prefix, verbose=False)
    said = f"position embeddings interpolated from {side} × {side} patches to {grid[0]} × {grid[1]}"
    return {**state, name: made}, [said]
