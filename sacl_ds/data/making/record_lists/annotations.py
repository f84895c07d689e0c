"""Caption files in JSON, which are read whole: Karpathy's and COCO's."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from sacl_ds.data.inside import LeadsOut, inside
from sacl_ds.data.json_files import read_json
from sacl_ds.data.karpathy import karpathy_split
from sacl_ds.data.making.record import ImageFile, Record, no_image
from sacl_ds.errors import UserError


def karpathy_records(annotations: Path, images: Path, split: str) -> list[Record]:
    """Records of one split of a Karpathy JSON (COCO, Flickr30k, Flickr8k); 'train' takes 'restval' too.

    Raises UserError as `karpathy_split`.
    """
    return [
        Record(
            key=f"{number:09d}",
            captions=entry.captions,
            load=ImageFile(str(entry.places(images)[0])),
            meta={"filename": entry.filename, "imgid": number if entry.imgid is None else entry.imgid},
            where=f"{annotations}, image {entry.filename}",
        )
        for number, entry in enumerate(karpathy_split(annotations, split))
    ]


def coco_records(annotations: Path, images: Path) -> list[Record]:
    """Records of a COCO captions JSON in the order of its 'images'; all captions of an image in one sample.

    A caption whose image_id no image has becomes a broken record at the end. Raises UserError for a file that cannot
    be read.
    """
    document = read_json(annotations)
    captions: dict[Any, list[str]] = defaultdict(list)
    try:
        for annotation in document["annotations"]:
            captions[annotation["image_id"]].append(_text(annotation["caption"]))
        records = [
            Record(
                key=f"{number:09d}",
                captions=captions.pop(entry["id"], []),
                load=ImageFile(inside(images, _text(entry["file_name"]))),
                meta={"filename": entry["file_name"], "image_id": entry["id"]},
                where=f"{annotations}, image {entry['id']} ({entry['file_name']})",
            )
            for number, entry in enumerate(document["images"])
        ]
    except LeadsOut as error:
        raise UserError(f"{annotations}: {error}; correct it, or give a folder above both as --images") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{annotations} is no COCO captions JSON: {error} is missing") from None
    if not records:
        raise UserError(f"{annotations}: 'images' is empty")
    for image_id, orphans in captions.items():
        where, problem = f"{annotations}, image_id {image_id}", "caption of an image that 'images' lacks"
        records.append(Record(f"{len(records):09d}", orphans, no_image, {"image_id": image_id}, where, problem))
    return records


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text in place of {value!r:.60}")
    return value
