"""Reading of annotation files, JSON and JSON lines, and of the image files they name; errors name the entry."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sacl_ds.errors import UserError


class LeadsOut(ValueError):
    """Raised for a path outside the folder; the message says which path, and out of where."""


def inside(folder: str | os.PathLike[str], *parts: str) -> str:
    """Join folder/part/part, confined to the folder.

    By name: links within the folder are the user's own, and followed.
    """
    if not any(part.startswith(os.sep) or ".." in part for part in parts):
        return os.path.join(folder, *parts)  # of millions
    base = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(base, *parts))
    if path != base and not path.startswith(base.rstrip(os.sep) + os.sep):
        raise LeadsOut(f"the path {os.path.join(*parts)[:200]!r} leads out of the folder of images")
    return os.path.join(folder, *parts)


def require_relative(*parts: str) -> None:
    """Raises LeadsOut where folder/part/part might lead out of any folder."""
    inside("/folder", *parts)


Made = TypeVar("Made")


def read_json(path: Path) -> Any:
    """Raises UserError where it cannot be read or is no JSON, with its line."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; lists within lists without end
        raise UserError(f"{path} cannot be read: {error}") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, object) of each line that is not empty. Raises UserError as `read_json`."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; lists within lists without end
        raise UserError(f"{path} cannot be read: {error}") from None


def each_entry(entries: Iterable[Any], where: Callable[[int], str], make: Callable[[Any], Made]) -> list[Made]:
    """Apply make(entry) to each entry. Raises UserError, with where(number from 0), at the first that lacks a field or
    has another type there."""
    made = []
    for number, entry in enumerate(entries):
        try:
            made.append(make(entry))
        except KeyError as error:
            raise UserError(f"{where(number)}: {error} is missing") from None
        except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise UserError(f"{where(number)}: not as expected: {error}") from None
    return made


def text_of(entry: Any, name: str) -> str:
    """Return a text field of an entry, for `each_entry`. Raises KeyError where it is missing, ValueError where it is no
    text."""
    value = entry[name]
    if not isinstance(value, str):
        shown = "null" if value is None else f"{value!r:.60}"
        raise ValueError(f"{name} is {shown}, not text")
    return value
