"""Reads the run configuration from defaults, a YAML file and key=value arguments.

What is wrong becomes one line that names the key, where it was set, and the nearest valid name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from sacl_ds.config import RunConfig, TrainingConfig
from sacl_ds.config.room import remember_typed
from sacl_ds.errors import UserError, nearest
from sacl_ds.files import require_unchanged
from sacl_ds.yaml_files import BadYaml, parse_yaml, plain_yaml

_DEEPEST = 20  # rooms in rooms
_LONGEST = 200  # characters of a value in an error line
Layer = tuple[str, dict[str, Any]]  # where it was set, for error lines, and what
Config = TypeVar("Config", bound=TrainingConfig)


def load_config(file: str | Path | None, overrides: list[str]) -> RunConfig:
    """Resolve a pre-training configuration: defaults, the YAML file, then key=value arguments such as
    'train.steps=500'.

    Raises UserError, one line, for what cannot be read or is not valid.
    """
    return resolve_layers(read_layers(file, overrides), RunConfig)


def read_layers(file: str | Path | None, overrides: list[str]) -> list[Layer]:
    """Read the settings of the YAML file and of each key=value argument, one layer each. Raises UserError."""
    layers = [] if file is None else [(f"in {file}", read_yaml(Path(file)))]
    return layers + [(f"in argument {_shown(argument)}", _parse_override(argument)) for argument in overrides]


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """Merge layers; later ones override earlier ones."""
    values: dict[str, Any] = {}
    for _, layer in layers:
        _merge(values, layer)
    return values


def resolve_layers(layers: Sequence[Layer], root: type[Config]) -> Config:
    """Raises UserError, one line that says where the value was set."""
    try:
        return root.model_validate(merged(layers))
    except ValidationError as error:
        raise UserError(_explain(error, layers, root)) from None


def read_yaml(path: Path, label: str | None = None) -> dict[str, Any]:
    """Read a configuration file without validating its settings.

    label: what error lines about a finished run begin with; None: its folder. Raises UserError, also where a
    finished run left it otherwise.
    """
    require_unchanged(path.parent, label or str(path.parent), path.name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"cannot read the configuration {path}: not UTF-8 text") from None
    loaded = parse_yaml(text, str(path))
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: a configuration is a mapping such as 'train: {{steps: 100}}', not {type(loaded).__name__}"
        )
    return loaded


def _parse_override(argument: str) -> dict[str, Any]:
    key, separator, text = argument.partition("=")
    if not separator or not key or key.count(".") > _DEEPEST:
        raise UserError(f"argument {_shown(argument)}: expected key=value, e.g. train.steps=100")
    try:
        value = plain_yaml(text)
    except BadYaml:
        value = text
    remember_typed(value)
    if isinstance(value, str):
        value = _number(value)
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _number(text: str) -> str | float:
    """Convert numbers such as 1e-4, which YAML reads as strings."""
    try:
        return float(text) if "e" in text.lower() and any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def _explain(error: ValidationError, layers: Sequence[Layer], root: type[BaseModel]) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = _where(path, layers)
    key = ".".join(path)[:_LONGEST]
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r} {where}{_hint(path, root)}".replace("  ", " ")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{message} ({where})" if where else message
    value = first["input"]
    shown = f", not {_shown(value)}" if not isinstance(value, dict) else ""
    return f"{key} {where}: {message[0].lower()}{message[1:]}{shown}".replace("  ", " ")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python spells no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _hint(path: list[str], root: type[BaseModel]) -> str:
    """Suggest the nearest valid key, else the same name in other sections, else list the valid keys."""
    valid = _keys_at(path[:-1], root)
    close = nearest(path[-1], valid)
    if close:
        return f" (did you mean {_full(path[:-1], close)!r}?)"
    known = [(room, name) for room in [[], *_rooms(root)] for name in _keys_at(room, root)]
    close = nearest(path[-1], {name for _, name in known})
    if close:
        return f" (did you mean {' or '.join(repr(_full(room, name)) for room, name in known if name == close)}?)"
    return f"; here are: {', '.join(valid)}"


def _where(path: list[str], layers: Sequence[Layer]) -> str:
    """Return the last layer that sets the key or a section that holds it."""
    for place, layer in reversed(layers):
        value: Any = layer
        depth = 0
        while depth < len(path) and isinstance(value, dict) and path[depth] in value:
            value = value[path[depth]]
            depth += 1
        if depth == len(path) or (depth and not isinstance(value, dict)):
            return place
    return ""


def _model_at(path: list[str], root: type[BaseModel]) -> type[BaseModel] | None:
    model = root
    for part in path:
        field = model.model_fields.get(part)
        found = [t for t in (field.annotation, *get_args(field.annotation)) if _is_room(t)] if field else []
        if not found:
            return None
        model = found[0]
    return model


def _is_room(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _keys_at(path: list[str], root: type[BaseModel]) -> list[str]:
    model = _model_at(path, root)
    return list(model.model_fields) if model else []


def _rooms(root: type[BaseModel], path: tuple[str, ...] = ()) -> list[list[str]]:
    found: list[list[str]] = []
    for key in _keys_at(list(path), root):
        inner = [*path, key]
        if _model_at(inner, root) is not None:
            found += [inner, *_rooms(root, tuple(inner))]
    return found


def _full(room: list[str], key: str) -> str:
    return ".".join([*room, key])
