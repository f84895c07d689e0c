"""What every error line must be."""

from __future__ import annotations


def is_one_line(error: Exception) -> bool:
    said = str(error)
    return len(said.splitlines()) == 1 and said.isprintable()
