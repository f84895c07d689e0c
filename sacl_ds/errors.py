"""The one exception type for what a user can do wrong, and the nearest valid name for what they misspelt."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # numbers of the system's errors where a disk or a quota is full


def one_line(text: str) -> str:
    """Remove line breaks from a text and spell out other characters that no terminal should get.

    Those are escapes, marks that turn the direction of writing, and halves of surrogate pairs.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (c.isspace() and c not in _BREAKS) else _spelt(c) for c in text)


_BREAKS = set("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029")


def _spelt(character: str) -> str:
    return " " if character in _BREAKS else character.encode("unicode_escape").decode("ascii")


class UserError(ValueError):
    """Mistake that the user can put right. The message is one line: what is wrong, where, what to do.

    The command lines print it without a traceback and exit with status 2. What files put into it cannot break the line
    or steer the terminal: see `one_line`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class SharedError(UserError):
    """UserError that every rank raises alike, so that one of them is enough to print it."""


class CannotLoad(UserError):
    """Failure of a library to load a model or tokenizer, by hub name or folder."""

    def __init__(self, setting: str, name: str, error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        if _exists(Path(name)):
            message = f"{setting}={name} cannot be loaded: {reason}"
        elif name.startswith(("/", ".", "~")):
            message = f"{setting}={name}: no such folder; correct the path"
        else:
            message = (
                f"{setting}={name}: no folder of that name, and the hub cannot be reached or lacks it; without "
                f"network, fetch it elsewhere and give the local folder ({reason[:120]})"
            )
        super().__init__(message)


class Fault(RuntimeError):
    """Failure of the machine, the network or another process, in one line; a restart may help, the user cannot."""


class Stopped(Exception):
    """Raised when the run stops as asked, after a checkpoint. The message says what asked, and where the run stands."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice nearest to `name` in spelling, or None where none is near."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return close[0] if close else None


def _exists(path: Path) -> bool:
    """Return whether a path exists; False, too, for what no file system takes as a name."""
    try:
        return path.exists()
    except OSError:
        return False
