"""Paths from annotation files and tables, confined to the folder of images: a downloaded list reads nothing else."""

from __future__ import annotations

import os


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
