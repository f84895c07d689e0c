"""Settings that the user typed in this process: only those may name shards that run commands (pipe:...).

A configuration, a list of shards, a run directory may have been downloaded; a command line has not.
"""

from __future__ import annotations

from typing import Any

_typed: set[str] = set()


def remember_typed(value: Any) -> None:
    """Remember a setting from the command line: a text, or lists and mappings of texts."""
    if isinstance(value, str):
        _typed.add(value.strip())
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            remember_typed(inner)


def was_typed(text: str) -> bool:
    return text.strip() in _typed
