"""Export a run to a folder that other libraries load."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import ChineseCLIPProcessor, PerceiverImageProcessor

from sacl_ds import __version__
from sacl_ds.config import ModelConfig
from sacl_ds.config.room import user_path
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.exporting.card import ExportSource, card, read_source, travelling
from sacl_ds.exporting.chinese_clip import chinese_clip, largest_difference, require_equal
from sacl_ds.files import flush, seal
from sacl_ds.model.saved import CONFIG, TOKENIZER, WEIGHTS, write_tensors
from sacl_ds.model.starts.pretrained import quiet


@contextmanager
def new_folder(out: Path, setting: str) -> Iterator[Path]:
    """Make a folder beside `out` to write into; it is renamed to `out` when the block ends, removed when it fails.

    setting: what error lines call it. Raises UserError where `out` holds something already, or cannot be written.
    """
    label = f"{setting} {out}"
    require_free(out, setting)
    target = user_path(out).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{label} cannot be made: {error.strerror}; choose another folder") from None
    try:
        yield temporary
        _release(temporary)
        require_free(out, setting)
        temporary.rename(target)
        flush(target.parent)
    except OSError as error:
        raise UserError(f"{label} cannot be written: {error.strerror or error}; make room, or choose another") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(out: Path, setting: str) -> None:
    """Raises UserError where `out` is neither absent nor an empty folder."""
    target = user_path(out)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise UserError(f"{setting} {out} is there already, and nothing is overwritten; choose another folder")


def _release(folder: Path) -> None:
    """Flush the folder to the disk, with the usual rights: temporary folders and safetensors files are private."""
    mask = _umask()
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        flush(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def image_processor(config: ModelConfig) -> PerceiverImageProcessor:
    """Make the image processor, Perceiver's: it crops the middle square before it resizes, as `CanonicalView` does.

    CLIP's and Chinese CLIP's resize first and crop whole pixels, which moves a picture by up to half a pixel.
    """
    square = {"height": config.image_size, "width": config.image_size}
    return PerceiverImageProcessor(
        size=square,
        crop_size=square,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        do_convert_rgb=True,
    )


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
