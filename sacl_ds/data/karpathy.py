"""Karpathy's JSON of COCO, Flickr30k and Flickr8k: images of a split with their sentences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sacl_ds.data.json_files import each_entry, read_json, require_relative, text_of
from sacl_ds.errors import UserError


@dataclass(frozen=True, slots=True)
class KarpathyImage:
    """Image entry of a split. number: its place in 'images', from 0. imgid, cocoid, sentids (one a sentence): None
    where the file has none.

    number: its place in 'images', from 0. imgid, cocoid, sentids (one a sentence): None where the file has none.
    """

    number: int
    filename: str
    filepath: str
    captions: list[str]
    imgid: int | None
    cocoid: int | None
    sentids: list[int] | None

    def places(self, folder: Path) -> tuple[Path, ...]:
        """Candidate paths of the image: in the folder that the JSON names, or directly in `folder`."""
        return tuple(dict.fromkeys((folder / self.filepath / self.filename, folder / self.filename)))


def karpathy_split(path: Path, split: str) -> list[KarpathyImage]:
    """List the images of one split; 'train' takes 'restval' too.

    Raises UserError for a file that cannot be read, an entry that is not as it should be, and for an empty split
    (naming those there are).
    """
    entries, splits = _entries(path)
    wanted = {split, "restval"} if split == "train" else {split}
    chosen = [number for number, name in enumerate(splits) if name in wanted]
    if not chosen:
        raise UserError(f"{path}: no images in split {split!r}; there are: {', '.join(sorted(set(splits)))}")
    return each_entry(chosen, lambda place: _where(path, chosen[place]), lambda number: _image(number, entries[number]))


def karpathy_splits(path: Path) -> set[str]:
    """Return the names of the splits that the file has. Raises UserError as `karpathy_split`."""
    return set(_entries(path)[1])


def _entries(path: Path) -> tuple[list[Any], list[str]]:
    """List the file's entries in 'images' with the split of each."""
    document = read_json(path)
    entries = document.get("images") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path} is no Karpathy JSON: no list 'images' in it; give a dataset_*.json of his")
    return entries, each_entry(entries, lambda number: _where(path, number), lambda entry: text_of(entry, "split"))


def _where(path: Path, number: int) -> str:
    return f"{path} is no Karpathy JSON: images[{number}]"


def _image(number: int, entry: Any) -> KarpathyImage:
    sentences = entry["sentences"]
    ids = [each.get("sentid") for each in sentences]
    filename, filepath = text_of(entry, "filename"), text_of(entry, "filepath") if "filepath" in entry else ""
    require_relative(filepath, filename)
    require_relative(filename)
    return KarpathyImage(
        number=number,
        filename=filename,
        filepath=filepath,
        captions=[text_of(each, "raw") for each in sentences],
        imgid=_number(entry, "imgid"),
        cocoid=_number(entry, "cocoid"),
        sentids=None if None in ids else [int(each) for each in ids],
    )


def _number(entry: Any, name: str) -> int | None:
    value = entry.get(name)
    return None if value is None else int(value)
