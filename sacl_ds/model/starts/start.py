"""Initial weights of a model: model.start alone, or image and text encoder each from their own source."""

from __future__ import annotations

from pathlib import Path

from sacl_ds.config import ModelConfig
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import TOKENIZER
from sacl_ds.model.starts.image import PART, load_image_weights
from sacl_ds.model.starts.report import SourceReport, StartReport
from sacl_ds.model.starts.text import bert_positions, load_bert
from sacl_ds.model.starts.whole import load_start, run_folder, run_positions


def load_starts(model: SaclModel, config: ModelConfig) -> StartReport:
    """Fill a model, made with pretrained=True, from model.start, model.image_weights and model.text_encoder.

    Raises UserError where one of them cannot be loaded or does not fit.
    """
    sources = []
    if config.start:
        sources.append(load_start(model, config))
    else:
        if config.image_weights:
            sources.append(load_image_weights(model.image_encoder, config.image_weights, config.image_encoder))
        elif config.timm_weights:
            # timm itself has loaded them, and raises where one is missing
            names = [PART + name for name in model.image_encoder.vit.state_dict()]
            part = ("image_encoder.",)
            sources.append(SourceReport("model.image_encoder", config.image_encoder, part, names, (), names))
        if config.text_encoder:
            sources.append(load_bert(model, config.text_encoder))
    return StartReport(list(model.state_dict()), sources)


def with_positions(config: ModelConfig) -> ModelConfig:
    """Set max_positions to that of the text encoder's source, so that a finished run needs the source no more.

    Raises UserError where they cannot be read, or where captions may be longer.
    """
    positions = config.max_positions
    folder = run_folder(config.start) if config.start else None
    if config.start and not folder and not config.text_encoder:
        raise UserError(
            f"model.start={config.start} goes with BERT's vocabulary; set model.text_encoder to that BERT "
            "(google-bert/bert-base-uncased, or its folder), of which its tokenizer is taken"
        )
    if positions is None and folder:
        positions = run_positions(folder)
    elif positions is None and config.text_encoder:
        positions = bert_positions(config.text_encoder)
    if positions is not None and positions < config.max_tokens:
        raise UserError(
            f"model.max_tokens={config.max_tokens}: the text encoder has {positions} positions; "
            f"set model.max_tokens={positions} or fewer"
        )
    return config.model_copy(update={"max_positions": positions})


def tokenizer_source(config: ModelConfig) -> tuple[str | Path, str] | None:
    """Return (where the tokenizer is, the setting that says so); None where one is to be trained."""
    folder = run_folder(config.start) if config.start else None
    if folder:
        return folder / TOKENIZER, "model.start"
    return (config.text_encoder, "model.text_encoder") if config.text_encoder else None
