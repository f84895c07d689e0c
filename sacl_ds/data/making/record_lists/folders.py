"""Records of a folder of images, each with a .txt of the same stem beside it, one caption a line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from sacl_ds.data.captions import BadText, decoded
from sacl_ds.data.making.record import ImageFileLoader, Record, no_image
from sacl_ds.data.shards.layout import IMAGE_EXTENSIONS
from sacl_ds.errors import UserError


class FolderRecords:
    """Records sorted by name within each folder, subfolders in their place among the files.

    Links are followed, but a folder is read once, by whichever of its names comes first. Hidden files and folders are
    skipped.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __iter__(self) -> Iterator[Record]:
        number = 0
        for folder, stem, files in _stems(str(self.root), set()):
            images = [name for name in files if _extension(name) in IMAGE_EXTENSIONS]
            texts = [name for name in files if _extension(name) == "txt"]
            text = os.path.join(folder, texts[0]) if texts else os.path.join(folder, f"{stem}.txt")
            captions, problem = _read_captions(text) if images and texts else ([], "")
            if images and not texts:
                problem = "no .txt beside the image"
            for name in images:
                path = os.path.join(folder, name)
                meta = {"filename": os.path.relpath(path, self.root)}
                yield Record(f"{number:09d}", captions, ImageFileLoader(path), meta, path, problem)
                number += 1
            if texts and not images:
                meta = {"filename": os.path.relpath(text, self.root)}
                problem = f"no {', '.join(IMAGE_EXTENSIONS)} beside the text"
                yield Record(f"{number:09d}", [], no_image, meta, text, problem)
                number += 1


def folder_records(root: Path) -> FolderRecords:
    """Return the records of all images under `root`. Raises UserError where that is no folder."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder; correct --images")
    return FolderRecords(root)


def _stems(folder: str, read: set[tuple[int, int]]) -> Iterator[tuple[str, str, list[str]]]:
    """(folder, stem, files of that stem), in order. Holds the names of one folder and those above it.

    read: device and inode of the folders so far, to which a link may lead back.
    """
    names: list[str] = []
    folders: set[str] = set()
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in read:
            return
        read.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                names.append(entry.name)
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    folders.add(entry.name)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    names.sort()
    names.sort(key=_stem)
    for stem, group in groupby(names, key=_stem):
        files = []
        for name in group:
            if name in folders:
                yield from _stems(os.path.join(folder, name), read)
            else:
                files.append(name)
        yield folder, stem, files


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower().lstrip(".")


def _read_captions(path: str) -> tuple[list[str], str]:
    """Read a file of captions: (captions, "") or ([], what is wrong). Empty lines are no captions."""
    try:
        with open(path, "rb") as file:
            lines = re.split("\r\n?|\n", decoded(file.read()))
    except BadText as error:
        return [], str(error)
    except OSError as error:
        return [], f"text unreadable: {error.strerror}"
    return [line for line in lines if line.strip()], ""
