"""Records from lists: folders of images, annotations of COCO and Karpathy, tables, built-in scenes."""

from __future__ import annotations

import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sacl_ds.data.captions import BadText, decoded
from sacl_ds.data.json_files import each_entry, inside, read_json, text_of
from sacl_ds.data.karpathy import karpathy_split
from sacl_ds.data.making.record import ImageFileLoader, Record, no_image
from sacl_ds.data.making.tables import table_records
from sacl_ds.data.shards.patterns import IMAGE_EXTENSIONS
from sacl_ds.errors import UserError

if TYPE_CHECKING:  # it draws with torch
    from sacl_ds.data.scenes import Scenes


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


def karpathy_records(annotations: Path, images: Path, split: str) -> list[Record]:
    """List the records of one split of a Karpathy JSON (COCO, Flickr30k, Flickr8k); 'train' takes 'restval' too.

    Raises UserError as `karpathy_split`.
    """
    return [
        Record(
            key=f"{number:09d}",
            captions=entry.captions,
            load=ImageFileLoader(str(entry.places(images)[0])),
            meta={"filename": entry.filename, "imgid": number if entry.imgid is None else entry.imgid},
            where=f"{annotations}, image {entry.filename}",
        )
        for number, entry in enumerate(karpathy_split(annotations, split))
    ]


def coco_records(annotations: Path, images: Path) -> list[Record]:
    """List the records of a COCO captions JSON in the order of its 'images', one an image with all its captions.

    A caption that is null is an empty one, and one whose image_id no image has becomes a broken record at the end.
    Raises UserError, with the entry, for a file that is not as it should be.
    """
    document = read_json(annotations)
    if not isinstance(document, dict):
        raise UserError(
            f"{annotations} is no COCO captions JSON: {type(document).__name__}, not an object with 'images' and "
            "'annotations'; of results, give the captions_*.json instead"
        )
    for name in ("images", "annotations"):
        if not isinstance(document.get(name), list):
            raise UserError(f"{annotations} is no COCO captions JSON: no list {name!r} in it; give a captions_*.json")
    captions: dict[Any, list[str]] = defaultdict(list)

    def add(entry: Any) -> None:
        captions[entry["image_id"]].append("" if entry["caption"] is None else text_of(entry, "caption"))

    def record(numbered: tuple[int, Any]) -> Record:
        number, entry = numbered
        return Record(
            key=f"{number:09d}",
            captions=captions.pop(entry["id"], []),
            load=ImageFileLoader(inside(images, text_of(entry, "file_name"))),
            meta={"filename": entry["file_name"], "image_id": entry["id"]},
            where=f"{annotations}, image {entry['id']} ({entry['file_name']})",
        )

    each_entry(document["annotations"], lambda number: f"{annotations} annotations[{number}]", add)
    listed = list(enumerate(document["images"]))
    records = each_entry(listed, lambda number: f"{annotations} images[{number}]", record)
    if not records:
        raise UserError(f"{annotations}: 'images' is empty")
    for image_id, orphans in captions.items():
        where, problem = f"{annotations}, image_id {image_id}", "caption of an image that 'images' lacks"
        records.append(Record(f"{len(records):09d}", orphans, no_image, {"image_id": image_id}, where, problem))
    return records


class SceneRecords:
    """Records of scenes as PNG, each drawn when it is asked for: JPEG would blur their edges."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self.scenes)):
            yield Record(
                key=self.scenes.key(index),
                captions=[caption.text for caption in self.scenes.captions(index)],
                load=partial(_png, self.scenes, index),
                meta={"scene_seed": self.scenes.seed, "scene_index": index},
                where=f"scene {index}",
            )


def scene_records(count: int, seed: int, image_size: int, detail: str) -> SceneRecords:
    """Return records of `count` built-in scenes."""
    from sacl_ds.data.scenes import Scenes

    return SceneRecords(Scenes(count, seed, image_size, detail))


def _png(scenes: Scenes, index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scenes.image(index)).save(buffer, "png")
    return buffer.getvalue()


__all__ = ["coco_records", "folder_records", "karpathy_records", "scene_records", "table_records"]
