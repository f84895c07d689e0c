"""Atomic creation of a folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sacl_ds.atomic import flush
from sacl_ds.config.paths import user_path
from sacl_ds.errors import UserError


@contextmanager
def new_folder(out: Path, setting: str) -> Iterator[Path]:
    """Make a folder beside `out` to write into; it is renamed to `out` when the block ends, removed when it fails.

    setting: what error lines call it. Raises UserError where `out` holds something already, or cannot be written.
    """
    label = f"{setting} {out}"
    require_free(out, setting)
    target = user_path(out).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{label} cannot be made: {error.strerror}; choose another folder") from None
    try:
        yield temporary
        _release(temporary)
        require_free(out, setting)
        temporary.rename(target)
        flush(target.parent)
    except OSError as error:
        raise UserError(f"{label} cannot be written: {error.strerror or error}; make room, or choose another") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(out: Path, setting: str) -> None:
    """Raises UserError where `out` is neither absent nor an empty folder."""
    target = user_path(out)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise UserError(f"{setting} {out} is there already, and nothing is overwritten; choose another folder")


def _release(folder: Path) -> None:
    """Flush the folder to the disk, with the usual rights: temporary folders and safetensors files are private."""
    mask = _umask()
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        flush(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
