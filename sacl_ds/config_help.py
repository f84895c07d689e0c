"""Descriptions of the settings, made from the code: `key=?` on the command line, and docs/configuration.md."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sacl_ds.config import PRESETS, ModelConfig, RunConfig
from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.errors import UserError, nearest


@dataclass(frozen=True)
class Setting:
    key: str  # dotted
    kind: str  # what it takes, in words
    default: str
    description: str
    choices: tuple[str, ...]  # where it is one of a few

    def __str__(self) -> str:
        return f"{self.key} = {self.default}\n    {self.kind}; {self.description}"


def settings(root: type[BaseModel] = RunConfig) -> list[Setting]:
    """List every setting of a kind of run, in the order of the code. root: the kind of run."""
    return list(_walk(root, ""))


def explain(keys: list[str], root: type[BaseModel] = RunConfig) -> str:
    """Answer `key=?` for each key, a section or a setting; "" stands for all. Raises UserError for neither."""
    known = settings(root)
    parts = []
    for key in keys:
        inside = [s for s in known if not key or s.key == key or s.key.startswith(f"{key}.")]
        if not inside:
            rooms = {s.key.rpartition(".")[0] for s in known}
            close = nearest(key, {s.key for s in known} | rooms)
            raise UserError(f"{key}=?: no such setting{f' (did you mean {close}?)' if close else ''}; '?' lists all")
        parts += [str(setting) for setting in inside]
    return "\n".join(parts)


def markdown(root: type[BaseModel] = RunConfig) -> str:
    """Format all settings as tables, one a section; settings equal to those of pre-training are left out for other
    kinds."""
    lines: list[str] = []
    room = None
    known = settings(root)
    if root is not RunConfig:
        same = set(settings())
        known = [setting for setting in known if setting not in same]
    for setting in known:
        here = setting.key.rpartition(".")[0]
        if here != room:
            lines += ["", f"### {here or 'run'}", "", "| key=default | |", "|---|---|"]
            room = here
        if setting.default.startswith("by "):
            cells = [f"`{setting.key}`", f"{setting.description} ({setting.default})"]
        else:
            cells = [f"`{setting.key}={setting.default}`", setting.description]
        others = [choice for choice in setting.choices if choice != setting.default]
        cells[0] += f" or {', '.join(others)}" if others else ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).strip() + "\n"


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    plain = {name: field for name, field in model.model_fields.items() if not _is_room(field.annotation)}
    for name, field in plain.items():
        default, described = _default(model, name, field), field.description or ""
        yield Setting(prefix + name, _kind(field), default, described, _choices(field))
    for name, field in model.model_fields.items():
        if name not in plain:
            assert isinstance(field.annotation, type)
            yield from _walk(field.annotation, f"{prefix}{name}.")


def _is_room(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _choices(field: FieldInfo) -> tuple[str, ...]:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _default(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    if model is ModelConfig and field.is_required():
        return f"by preset: {', '.join(f'{preset} {_shown(values[name])}' for preset, values in PRESETS.items())}"
    return "by --task" if field.is_required() else _shown(field.default)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(v) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    return str(value)


def _kind(field: FieldInfo) -> str:
    return _words(field.annotation, _bounds(field.metadata))


_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}


def _words(annotation: Any, bounds: dict[str, Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return " or ".join([_words(a, bounds) for a in inner] + ["null"])
    if hasattr(annotation, "__metadata__"):  # Annotated inside something else
        inner_metadata = [m for field in annotation.__metadata__ for m in getattr(field, "metadata", [field])]
        return _words(arguments[0], _bounds(inner_metadata))
    if origin is tuple:
        return f"[{', '.join(_words(a, {}) for a in arguments)}]"
    if origin is dict:
        return "mapping"
    name = _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
    if "Le" in bounds:
        return f"{name} from {bounds['Ge']} to {bounds['Le']}"
    if "Lt" in bounds:
        return f"{name} from {bounds['Ge']} to below {bounds['Lt']}"
    if "Gt" in bounds:
        return f"{name} above {bounds['Gt']}"
    return f"{name}, {bounds['Ge']} or more" if "Ge" in bounds else name


def _bounds(metadata: list[Any]) -> dict[str, Any]:
    names = {"gt": "Gt", "ge": "Ge", "le": "Le", "lt": "Lt"}
    found = {bound: getattr(m, name) for m in metadata for name, bound in names.items() if hasattr(m, name)}
    return {bound: value for bound, value in found.items() if value is not None}


_GENERATED = "## Settings\n"
_TASKS = """Of `launch/finetune.py` and `launch/evaluate.py`, where they are not as above. Defaults of `optim`, `train`
and `augment` follow the task and `data.source`: [downstream.md](downstream.md)."""


def write_tables(path: Path) -> None:
    """Replace what follows the heading "Settings" in a page by `markdown()`."""
    text = path.read_text()
    tasks = f"## Settings of downstream tasks\n\n{_TASKS}\n\n{markdown(FinetuneConfig)}"
    path.write_text(text[: text.index(_GENERATED)] + _GENERATED + "\n" + markdown() + "\n" + tasks)


if __name__ == "__main__":
    write_tables(Path(sys.argv[1]))
