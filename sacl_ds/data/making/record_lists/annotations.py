"""Records from caption files in JSON, Karpathy's and COCO's, which are read whole."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from sacl_ds.data.inside import inside
from sacl_ds.data.json_files import each_entry, read_json, text_of
from sacl_ds.data.karpathy import karpathy_split
from sacl_ds.data.making.record import ImageFileLoader, Record, no_image
from sacl_ds.errors import UserError


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
