"""Initialisation from a BERT: its lower layers become the text encoder, its upper ones the fusion encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import BertForMaskedLM

from sacl_ds.errors import UserError
from sacl_ds.model.placing import place, require_parts, require_shapes
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.starts.pretrained import load_pretrained, load_settings
from sacl_ds.model.starts.report import SourceReport

SETTING = "model.text_encoder"
PARTS = ("text_encoder.", "fusion_encoder.", "mlm_head.")
WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
_HEAD = {"transform.dense.": "mlm_head.dense.", "transform.LayerNorm.": "mlm_head.norm.", "bias": "mlm_head.bias"}
_TIED = {"cls.predictions.decoder.weight": WORDS, "cls.predictions.decoder.bias": "cls.predictions.bias"}


def bert_positions(name: str) -> int:
    """Return the positions that a BERT (hub name or folder of transformers) has. Raises UserError."""
    return int(_config(name).max_position_embeddings)


def load_bert(model: SaclModel, name: str) -> SourceReport:
    """Copy a BERT (hub name or folder of transformers) into the text encoder, the fusion encoder and the MLM head.

    Cross-attention has no counterpart in BERT and stays as initialised, and so does the MLM head where the folder holds
    none. Raises UserError where the BERT cannot be loaded or its sizes differ from the model's.
    """
    label = f"{SETTING}={name}"
    config = _config(name)
    own = model.text_encoder.bert.config
    if config.hidden_act != own.hidden_act:
        raise UserError(
            f"{label}: trained with {config.hidden_act}, layers here compute {own.hidden_act}; give another"
        )
    if config.hidden_size == own.hidden_size and config.num_attention_heads != own.num_attention_heads:
        raise UserError(
            f"{label}: {config.num_attention_heads} heads there and {own.num_attention_heads} in the model; "
            f"set model.text_heads={config.num_attention_heads}"
        )
    bert, missing, unexpected = load_pretrained(BertForMaskedLM, name, SETTING)
    state = {key.removeprefix("bert."): value for key, value in bert.state_dict().items() if key not in missing}
    if WORDS not in state:
        raise UserError(f"{label}: no BERT in its weights; give a folder of BertModel or BertForMaskedLM")
    tensors, left_over = bert_tensors(state, model, label)
    left_over += unexpected
    loaded, _ = place(model, tensors, label)
    require_parts(model, loaded, label, PARTS[:2], new=".crossattention.")
    notes = []
    if config.layer_norm_eps != own.layer_norm_eps:
        notes.append(f"norms have eps {config.layer_norm_eps:g} there and {own.layer_norm_eps:g} in the model")
    return SourceReport(SETTING, name, PARTS, loaded, left_over, [*state, *left_over], tuple(notes))


def bert_tensors(state: Mapping[str, Tensor], model: SaclModel, label: str) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a BERT's tensors to the model's names; also return the names of the others.

    state: BERT's names from 'embeddings.', 'encoder.' and 'cls.' on. Raises UserError for other sizes than the model's.
    """
    text = len(model.text_encoder.bert.encoder.layer)
    _require_sizes(state, model, label)
    tensors, left_over = {}, []
    for name, tensor in state.items():
        tied = _TIED.get(name)
        if tied is not None and tied in state and torch.equal(tensor, state[tied]):
            continue
        own = _own_name(name, text)
        if own is None:
            left_over.append(name)
        else:
            tensors[own] = tensor
    require_shapes(model, tensors, label, "give a BERT whose layers are of BERT's proportions, or another width")
    present = model.state_dict().keys()
    return {n: t for n, t in tensors.items() if n in present}, left_over + [n for n in tensors if n not in present]


def _own_name(name: str, text_layers: int) -> str | None:
    if name.startswith("embeddings.") and not name.endswith("position_ids"):
        return f"text_encoder.bert.{name}"
    if name.startswith("cls.predictions."):
        rest = name.removeprefix("cls.predictions.")
        return next((new + rest.removeprefix(old) for old, new in _HEAD.items() if rest.startswith(old)), None)
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
    if layer is None:
        return None
    number = int(layer[1])
    if number < text_layers:
        return f"text_encoder.bert.{name}"
    return f"fusion_encoder.encoder.layer.{number - text_layers}.{layer[2]}"


def _require_sizes(state: Mapping[str, Tensor], model: SaclModel, label: str) -> None:
    """Check width, layers, vocabulary and positions; an error names the setting that puts it right."""
    text, fusion = model.text_encoder.bert, model.fusion_encoder.encoder
    words, positions = state[WORDS], state.get(POSITIONS)
    own_words, width = text.embeddings.word_embeddings.weight.shape
    if words.shape[1] != width:
        raise UserError(
            f"{label}: {WORDS} is {words.shape[0]} × {words.shape[1]} there and {own_words} × {width} in the model; "
            f"set model.text_width={words.shape[1]} and model.text_heads to match"
        )
    crossed = {int(m[1]) for name in state if (m := re.match(r"encoder\.layer\.(\d+)\.crossattention\.", name))}
    if 0 in crossed:
        raise UserError(
            f"{label}: BLIP's layout, whose text encoder reads the image from layer 0 on, so that none of its layers "
            "sees texts alone; give an ALBEF, or this as model.image_weights, which takes its image encoder"
        )
    layers = len({m[1] for name in state if (m := re.match(r"encoder\.layer\.(\d+)\.", name))})
    wanted = len(text.encoder.layer) + len(fusion.layer)
    if layers != wanted:
        raise UserError(
            f"{label} has {layers} layers, and model.text_layers + model.fusion_layers is {wanted}; "
            f"set e.g. model.text_layers={layers - layers // 2} model.fusion_layers={layers // 2}"
        )
    if crossed and min(crossed) != len(text.encoder.layer):
        raise UserError(
            f"{label} reads the image from layer {min(crossed)} on; model.text_layers is {len(text.encoder.layer)}; "
            f"set model.text_layers={min(crossed)} model.fusion_layers={layers - min(crossed)}"
        )
    if words.shape[0] != own_words:
        raise UserError(
            f"{label}: embeddings of {words.shape[0]} tokens there, and the tokenizer has {own_words}; "
            "give the tokenizer that these weights were trained with, as model.text_encoder"
        )
    own_positions = text.embeddings.position_embeddings.weight.shape[0]
    if positions is not None and positions.shape[0] != own_positions:
        raise UserError(
            f"{label}: {positions.shape[0]} positions there and {own_positions} in the model; "
            f"set model.max_positions={positions.shape[0]}"
        )


def _config(name: str):  # type: ignore[no-untyped-def]
    """Load the configuration of a BERT. Raises UserError where it cannot be loaded or is of another model."""
    config = load_settings(name, SETTING)
    if config.model_type != "bert":
        raise UserError(f"{SETTING}={name} holds a model of type {config.model_type!r}; give a BERT")
    return config
