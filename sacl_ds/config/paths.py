"""Paths that users give: `~` is their home, on the command line, in a file and in an option alike."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

_BEFORE_PATHS = ("@", "local-dir:")  # of a list of shards; of timm


def expanded(path: str) -> str:
    """Expand `~`, also after `@` and `local-dir:`; other text, such as a hub name, is returned as it is."""
    before = next((each for each in _BEFORE_PATHS if path.startswith(each)), "")
    return before + os.path.expanduser(path.removeprefix(before))


PathText = Annotated[str, AfterValidator(expanded)]  # a setting


def user_path(path: str | os.PathLike[str]) -> Path:
    """Convert a path that a user gave to a Path; for argparse's `type` and for arguments in Python."""
    return Path(expanded(os.fspath(path)))
