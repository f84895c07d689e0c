"""Triton's interpreter, without looking through all of triton.language for its functions at every call of a kernel."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter


@cache
def _names(place: Any) -> list[str]:
    """Of a module's or class's builtins, as they are before the first launch."""
    return [name for name, member in inspect.getmembers(place) if is_builtin(member)]


def _patch_builtin(place: Any, *rest: Any) -> None:
    for name in _names(place):
        member = getattr(place, name)
        if is_builtin(member):
            interpreter._patch_attr(place, name, member, *rest)


interpreter._patch_builtin = _patch_builtin
