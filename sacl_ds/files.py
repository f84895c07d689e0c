"""Files that are complete or absent, also after a power cut; and checksums of those that are finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sacl_ds.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file atomically and flush it to the disk; safe with several writers. Raises OSError, and leaves nothing
    then."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """fsync a file, or a folder so that renames in it survive a power loss. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


FILE = "checksums.json"  # of what is finished
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Written:
    """A file as it was written: bytes and hexadecimal sha256."""

    size: int
    sha256: str


def checksum(path: Path) -> Written:
    """Compute the size and SHA-256 of an existing file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Written(size, digest.hexdigest())


def write_manifest(path: Path, values: dict[str, Any]) -> None:
    """A manifest with its own checksum in it, atomically. values: JSON's. Raises OSError."""
    write_text(path, json.dumps(signed(values), indent=1))


def signed(values: Mapping[str, Any]) -> dict[str, Any]:
    """An object of JSON with its own checksum in it."""
    return {"sha256": _digest(values), **values}


def parsed(text: str | bytes) -> Any:
    """JSON; of an object that is signed, without its checksum. Raises ValueError where that is of another."""
    said = json.loads(text)
    if isinstance(said, dict) and "sha256" in said and said.pop("sha256") != _digest(said):
        raise ValueError("it is not as it was written")
    return said


def row_check(*parts: bytes) -> int:
    """Return the checksum of a row and of what it belongs to: crc32, which finds any change within 32 bits."""
    found = 0
    for part in parts:
        found = zlib.crc32(part, found)
    return found


def read_manifest(path: Path, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Written]]:
    """Read a manifest's values of `names` and its file entries. Raises OSError, or ValueError where it was changed."""
    try:
        said = json.loads(path.read_text())
        values = {name: said[name] for name in names}
        if said["sha256"] != _digest(values):
            raise ValueError("it is not as it was written")
        return values, {_inside(name): Written(**written) for name, written in values["files"].items()}
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from None
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None


def first_changed(folder: Path, files: Mapping[str, Written]) -> tuple[str, str] | None:
    """Return the first of these files that differs from its record, and how; None where all match."""
    for name in sorted(files):
        try:
            if checksum(folder / name) != files[name]:
                return name, "its checksum is not that of its manifest"
        except OSError as error:
            return name, error.strerror or "unreadable"
    return None


def seal(folder: Path, names: Iterable[str]) -> None:
    """Write the manifest of a finished folder: of these files, and of all files in these folders.

    Files that it holds already stay in it. Raises OSError, and UserError where it cannot be read.
    """
    parts = [folder / name for name in names]
    found = [file for part in parts for file in [part, *sorted(part.rglob("*"))] if file.is_file()]
    written = {file.relative_to(folder).as_posix(): asdict(checksum(file)) for file in found}
    with _locked(folder):
        known = {name: asdict(each) for name, each in _manifest(folder, str(folder)).items()}
        write_manifest(folder / FILE, {"files": known | written})


def unseal(folder: Path) -> None:
    """Remove the manifest, before any of its files changes. Raises OSError."""
    (folder / FILE).unlink(missing_ok=True)


def require_unchanged(folder: Path, source: str, *names: str) -> None:
    """Raises UserError where a file of `folder` is not as it was when that was finished.

    names: files and folders in it, with all that was in them; without any, all that there was. Folders without a
    manifest (of runs that are going on, or made by others) are taken as they are.
    """
    files = _manifest(folder, source)
    chosen = {file: written for file, written in files.items() if not names or file.partition("/")[0] in names}
    if changed := first_changed(folder, chosen):
        raise UserError(
            f"{source}: {': '.join(changed)} ({FILE}); take a whole copy of the folder, or, if you changed that file "
            f"yourself, remove {FILE}"
        )


def _manifest(folder: Path, source: str) -> dict[str, Written]:
    if not os.path.isfile(folder / FILE):  # False, too, for what no file system takes as a name
        return {}
    try:
        return read_manifest(folder / FILE, ("files",))[1]
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {FILE} cannot be read: {error}; take a whole copy of the folder") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Processes that seal files of one folder do so one after the other, where its file system has locks."""
    place = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _inside(name: str) -> str:
    """Raises ValueError where it may lie outside the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(f"{name!r} is not a file of it")
    return name
