"""Export a run to a folder that other libraries load."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import ChineseCLIPProcessor

from sacl_ds import __version__
from sacl_ds.checksums import seal
from sacl_ds.config.paths import user_path
from sacl_ds.data.text import Tokenizer
from sacl_ds.exporting.card import card
from sacl_ds.exporting.chinese_clip import chinese_clip, largest_difference, require_equal
from sacl_ds.exporting.folder import new_folder, require_free
from sacl_ds.exporting.processor import image_processor
from sacl_ds.exporting.settings import travelling
from sacl_ds.exporting.source import ExportSource, read_source
from sacl_ds.model.saved import CONFIG, TOKENIZER, WEIGHTS, write_tensors
from sacl_ds.model.starts.quiet import quiet

FORMS = ("hf", "safetensors")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_OUT = "--out"
_CARD = "README.md"
_KEPT_EXACT = "logit_scale."  # bf16 would move the temperature by up to 1 %


def export(checkpoint: str, form: str, out: Path, dtype: str = "fp32") -> list[str]:
    """Export `checkpoint` (a finished run, its checkpoints/step_N, an earlier export) to the new folder `out`.

    Returns lines to be printed. form: hf, the two towers as ChineseCLIPModel, or safetensors, the whole model. dtype:
    fp32 or bf16. Raises UserError where the run cannot be read, `out` is in use, or ChineseCLIPModel cannot hold the
    towers.
    """
    require_free(out, _OUT)
    source = read_source(checkpoint)
    write = _write_hf if form == "hf" else _write_safetensors
    with new_folder(out, _OUT) as folder, quiet():
        said = write(source, folder, dtype, user_path(out).absolute().name)
        seal(folder, (path.name for path in folder.iterdir() if path.name != _CARD))  # a card is for others to complete
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return [*said, f"{out}: {form}, {dtype}, {size / 2**20:.1f} MB"]


def _write_hf(source: ExportSource, folder: Path, dtype: str, name: str) -> list[str]:
    config = source.run.model
    made = chinese_clip(source.model, config, source.tokenizer, source.label)
    difference = largest_difference(source.model, made, config, source.tokenizer)
    require_equal(difference, source.label)
    widened = made.config.vision_config.hidden_size != source.model.image_encoder.width
    made.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size="1000GB")  # in one file
    processor = image_processor(config)
    tokenizer = _with_length(source.tokenizer)
    ChineseCLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / _CARD).write_text(card(source, "hf", dtype, name, widened), encoding="utf-8")
    said = [f"features of both towers equal the run's within {difference:.0e}, in fp32"]
    if widened:
        said.append("the image tower has one more head, which makes the norm before its blocks the identity")
    return said


def _write_safetensors(source: ExportSource, folder: Path, dtype: str, name: str) -> list[str]:
    settings = travelling(source.settings, source.label)
    tensors = {key: _cast(key, tensor, dtype) for key, tensor in source.model.state_dict().items()}
    said = {"step": source.step, "version": __version__, "dtype": dtype}
    write_tensors(tensors, folder / WEIGHTS, {"format": "pt", "sacl_ds": json.dumps(said)})
    (folder / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False))
    source.tokenizer.save(folder / TOKENIZER)
    image_processor(source.run.model).save_pretrained(folder)
    (folder / _CARD).write_text(card(source, "safetensors", dtype, name, widened=False), encoding="utf-8")
    return []


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    exact = name.startswith(_KEPT_EXACT) or not tensor.is_floating_point()
    return tensor if exact else tensor.to(DTYPES[dtype])


def _with_length(tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    """Return a copy that truncates, where it is asked to, to the length that the model was trained with."""
    fast = tokenizer.fast
    fast.backend_tokenizer.no_truncation()  # state of the last call
    fast.backend_tokenizer.no_padding()
    fast.model_max_length = tokenizer.max_tokens
    return fast
