"""Starting from a published BERT: its lower layers become the text encoder, its upper ones the fusion encoder."""

from __future__ import annotations

import logging

from torch import nn
from transformers import BertForMaskedLM

from sacl_ds.errors import UserError, cannot_load
from sacl_ds.model.sacl import SaclModel

log = logging.getLogger(__name__)


def load_bert(model: SaclModel, name_or_folder: str) -> None:
    """Copy a BERT (hub name or folder of transformers) into the text encoder, the fusion encoder and the MLM head.

    Cross-attention has no counterpart in BERT and stays as initialised. Raises UserError where the BERT cannot be
    loaded or its sizes differ from the model's.
    """
    try:
        bert = BertForMaskedLM.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise cannot_load("model.text_encoder", name_or_folder, error) from None
    text, fusion = model.text_encoder.bert, model.fusion_encoder.encoder
    layers = list(bert.bert.encoder.layer)
    wanted = len(text.encoder.layer) + len(fusion.layer)
    if len(layers) != wanted:
        raise UserError(
            f"model.text_encoder={name_or_folder!r} has {len(layers)} layers; "
            f"model.text_layers + model.fusion_layers is {wanted}"
        )
    try:
        _copy(bert.bert.embeddings, text.embeddings)
        for source, target in zip(layers, [*text.encoder.layer, *fusion.layer], strict=True):
            for part in ("attention", "intermediate", "output"):
                _copy(getattr(source, part), getattr(target, part))
        head = bert.cls.predictions
        _copy(head.transform.dense, model.mlm_head.dense)
        _copy(head.transform.LayerNorm, model.mlm_head.norm)
        model.mlm_head.bias.data.copy_(head.bias.data)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.text_encoder={name_or_folder!r} does not fit model.text_width and its kin: {reason}"
        ) from None
    log.info("loaded %s: %d layers; cross-attention of the fusion encoder is new", name_or_folder, wanted)


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
