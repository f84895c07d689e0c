"""Webdataset shards (tars of key.jpg, key.txt, key.json, as img2dataset writes them), read in place order.

Counts come from `NAME_stats.json` (img2dataset, `make_shards`) beside each tar, or from one scan of its headers.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import braceexpand
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from sacl_ds.data.images import BadImage, decode
from sacl_ds.data.order import Place
from sacl_ds.data.sample import Sample
from sacl_ds.data.shard_layout import IMAGE_EXTENSIONS, stats_path
from sacl_ds.errors import UserError


def expand(pattern: str, setting: str = "data.shards") -> list[str]:
    """'/data/{000..010}.tar' -> the files, in order. Raises UserError for no shard or a missing one."""
    files = sorted(braceexpand.braceexpand(pattern)) if pattern.strip() else []
    if not files:
        raise UserError(f"{setting} is an empty list of shards; give e.g. {setting}='/data/{{000..010}}.tar'")
    local = [file for file in files if "://" not in file and not file.startswith("pipe:")]
    missing = [file for file in local if not Path(file).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(files)})" if len(missing) > 1 else ""
        raise UserError(f"{setting}: shard {missing[0]} does not exist{more}; correct the pattern {pattern!r}")
    return files


def count_samples(shard: str) -> int:
    """From the stats beside the shard, else by reading the tar's headers (local files only)."""
    with suppress(OSError, KeyError, ValueError):
        return int(json.loads(stats_path(shard).read_text())["successes"])
    try:
        with tarfile.open(shard) as tar:
            return len({base_plus_ext(m.name)[0] for m in tar if m.isfile() and _extension(m.name) in IMAGE_EXTENSIONS})
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"shard {shard} has no {stats_path(shard).name} beside it and cannot be scanned: {error}"
        ) from None


def _extension(name: str) -> str:
    return (base_plus_ext(name)[1] or "").lower()


class ShardSource:
    """Webdataset tars as a `Source`."""

    def __init__(self, pattern: str, setting: str = "data.shards") -> None:
        self.files = expand(pattern, setting)
        with ThreadPoolExecutor(8) as pool:
            self.counts = list(pool.map(count_samples, self.files))
        if not sum(self.counts):
            raise UserError(f"{setting}: no samples in {len(self.files)} shards of {pattern!r}")

    def reader(self) -> ShardReader:
        return ShardReader(self.files)

    def decode(self, raw: tuple[str, dict[str, Any]]) -> Sample:
        """Raises UserError, naming shard and key, for an image that cannot be read or a missing caption."""
        shard, fields = raw
        key = fields["__key__"]
        data = next((fields[ext] for ext in IMAGE_EXTENSIONS if ext in fields), None)
        if data is None:
            raise UserError(f"shard {shard}, sample {key}: no image ({', '.join(IMAGE_EXTENSIONS)})")
        captions = captions_of(fields)
        if not captions:
            raise UserError(f"shard {shard}, sample {key}: no caption in its .txt or .json")
        try:
            image = decode(data)
        except BadImage as error:
            raise UserError(f"shard {shard}, sample {key}: the image cannot be decoded: {error}") from None
        return Sample(key, image, captions, data)

    def captions(self, limit: int) -> Iterator[str]:
        given = 0
        for file in self.files:
            for fields in read_samples(file, text_only=True):
                for caption in captions_of(fields):
                    yield caption
                    given += 1
                    if given >= limit:
                        return

    def iterate(self, limit: int | None, rank: int, world: int) -> Iterator[Sample]:
        number = 0
        for file in self.files:
            for fields in read_samples(file):
                if limit is not None and number >= limit:
                    return
                if number % world == rank:
                    yield self.decode((file, fields))
                number += 1


class ShardReader:
    """Reads shards front to back and keeps the one it stands in open."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.shard = -1
        self.next_offset = 0
        self.samples: Iterator[dict[str, Any]] = iter(())

    def fetch(self, places: Sequence[Place], wanted: Sequence[bool]) -> list[Any]:
        found: list[Any] = []
        for place, want in zip(places, wanted, strict=True):
            if not want:
                found.append(None)
                continue
            if place.shard != self.shard or place.offset < self.next_offset:
                self.shard, self.next_offset = place.shard, 0
                self.samples = read_samples(self.files[place.shard])
            fields = None
            while self.next_offset <= place.offset:
                fields = next(self.samples, None)
                self.next_offset += 1
                if fields is None:
                    raise UserError(
                        f"shard {self.files[self.shard]} ends before sample {place.offset}; its count is wrong or "
                        f"it is cut short: remove {stats_path(self.files[self.shard]).name} or make the shard again"
                    )
            found.append((self.files[self.shard], fields))
        return found


def read_samples(file: str, text_only: bool = False, without_image: bool = False) -> Iterator[dict[str, Any]]:
    """The samples of one tar in their order, as webdataset groups them: {'__key__': ..., 'jpg': bytes, ...}.

    text_only: without reading images. without_image: groups that have none too, which are no samples for training.
    """
    select = (lambda name: _extension(name) not in IMAGE_EXTENSIONS) if text_only else None
    try:
        with gopen(file) as stream:
            files = tar_file_expander([{"url": file, "stream": stream}], select_files=select)
            for fields in group_by_keys(files):
                if text_only or without_image or any(ext in fields for ext in IMAGE_EXTENSIONS):
                    yield fields
    except (OSError, tarfile.TarError, ValueError) as error:
        # webdataset adds the stream to the message and to the arguments
        reason = (error.strerror if isinstance(error, OSError) else None) or str(next(iter(error.args), error))
        raise UserError(f"shard {file} cannot be read: {reason.partition(' @ <')[0]}") from None


def captions_of(fields: dict[str, Any]) -> list[str]:
    """All captions: the list 'captions' of the .json where there is one, else the .txt, else 'caption' of the .json."""
    meta: dict[str, Any] = {}
    if "json" in fields:
        try:
            loaded = json.loads(fields["json"])
            meta = loaded if isinstance(loaded, dict) else {}
        except ValueError:
            meta = {}
    several = meta.get("captions")
    if isinstance(several, list):
        given = [caption for caption in several if isinstance(caption, str)]
    else:
        text = fields["txt"].decode("utf-8", "replace") if "txt" in fields else meta.get("caption")
        given = [text] if isinstance(text, str) else []
    return [caption.strip() for caption in given if caption.strip()]
