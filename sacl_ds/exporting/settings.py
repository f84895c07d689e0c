"""Configuration of a run as it travels: what the model is and how it was trained, not where things lay."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sacl_ds.errors import UserError

_LOCAL_MODEL = "local-dir:"
_PLACE = re.compile(r"[/~.]|[A-Za-z]+:")  # of a path, an address or a command, which may hold a password; no hub name
_LOADED = {"start": None, "image_weights": None, "image_pretrained": False}  # the export has the weights


def travelling(settings: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Reduce folders and addresses in config.yaml to their last names. Raises UserError where the image encoder is
    described in a folder of timm's that is gone."""
    made: dict[str, Any] = {name: _named(value) for name, value in settings.items()} | {"output_dir": None}
    model = dict(settings["model"])
    encoder = str(model["image_encoder"])
    if encoder.startswith(_LOCAL_MODEL):
        model |= _architecture(Path(encoder.removeprefix(_LOCAL_MODEL)), model, label)
    keys = ("image_encoder", "image_encoder_arguments")
    made["model"] = {**_named(model), **{key: model[key] for key in keys if key in model}, **_LOADED}
    return made


def _named(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _named(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_named(inner) for inner in value]
    if isinstance(value, str) and (_PLACE.match(value) or value.startswith("@")):
        return last_name(value)
    return value


def last_name(place: str) -> str:
    """Return the last part of a path or address; only 'pipe' for a command, which may hold secrets."""
    if place.startswith("pipe:"):
        return "pipe"
    return place.partition("?")[0].rstrip("/").rpartition("/")[2] or "."


def _architecture(folder: Path, model: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Read the architecture from timm's folder, as settings that need the folder no more."""
    file = folder / "config.json"
    try:
        said = json.loads(file.read_text())
        return {
            "image_encoder": str(said["architecture"]),
            "image_encoder_arguments": {**said.get("model_args", {}), **(model.get("image_encoder_arguments") or {})},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{label}: model.image_encoder is described in {file}, which cannot be read ({type(error).__name__}); put "
            "it back"
        ) from None
