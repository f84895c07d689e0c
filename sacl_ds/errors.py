"""The one exception type for what a user can do wrong, and the nearest valid name for what they misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right. The message is one line: what is wrong, where, what to do.

    The command lines print it without a traceback and exit with status 2.
    """


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice nearest to `name` in spelling, or None where none is near."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return close[0] if close else None
