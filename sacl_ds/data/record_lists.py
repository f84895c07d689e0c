"""Lists of samples to be written as shards: a Karpathy JSON with its images, or scenes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from sacl_ds.data.scenes import Scenes
from sacl_ds.data.shard_writer import Record
from sacl_ds.errors import UserError


def karpathy_records(annotations: Path, images: Path, split: str) -> list[Record]:
    """Records of one split of a Karpathy JSON (COCO, Flickr30k, Flickr8k); 'train' takes 'restval' too.

    Raises UserError for an unreadable file, an empty split (naming those there are), or missing images.
    """
    try:
        entries = json.loads(annotations.read_text())["images"]
        wanted = {split, "restval"} if split == "train" else {split}
        chosen = [entry for entry in entries if entry["split"] in wanted]
        splits = sorted({entry["split"] for entry in entries})
        records = [
            Record(
                key=f"{number:09d}",
                captions=[sentence["raw"].strip() for sentence in entry["sentences"] if sentence["raw"].strip()],
                load=partial(_read, images / entry.get("filepath", "") / entry["filename"]),
                meta={"filename": entry["filename"], "imgid": entry.get("imgid", number)},
            )
            for number, entry in enumerate(chosen)
        ]
    except OSError as error:
        raise UserError(f"cannot read {annotations}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{annotations} line {error.lineno}: not valid JSON: {error.msg}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{annotations} is no Karpathy JSON: {error} is missing in 'images'") from None
    if not records:
        raise UserError(f"{annotations}: no images in split {split!r}; there are: {', '.join(splits)}")
    missing = [r for r in records if not r.load.args[0].is_file()]  # type: ignore[attr-defined]
    if missing:
        path = missing[0].load.args[0]  # type: ignore[attr-defined]
        raise UserError(f"{len(missing)} of {len(records)} images are missing, first {path}; correct --images")
    silent = [r for r in records if not r.captions]
    if silent:
        raise UserError(f"{annotations}: image {silent[0].meta['filename']} has no caption ({len(silent)} such images)")
    return records


def scene_records(count: int, seed: int, image_size: int, detail: str) -> list[Record]:
    """Records of `count` built-in scenes, as PNG: JPEG would blur their edges."""
    scenes = Scenes(count, seed, image_size, detail)
    return [
        Record(
            key=scenes.key(index),
            captions=[caption.text for caption in scenes.captions(index)],
            load=_scene_png(scenes, index),
            meta={"scene_seed": seed, "scene_index": index},
        )
        for index in range(count)
    ]


def _read(path: Path) -> tuple[bytes, str]:
    return path.read_bytes(), path.suffix.lower().lstrip(".").replace("jpeg", "jpg")


def _scene_png(scenes: Scenes, index: int) -> Callable[[], tuple[bytes, str]]:
    def load() -> tuple[bytes, str]:
        buffer = io.BytesIO()
        Image.fromarray(scenes.image(index)).save(buffer, "png")
        return buffer.getvalue(), "png"

    return load
