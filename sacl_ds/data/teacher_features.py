"""Features of a frozen teacher on disk: one safetensors file a shard, found and checked by the teacher's identity.

A file holds `image` (n, d) and `text` (m, d), unit float16; `first_text` (n + 1,): sample i's captions are the rows
first_text[i] to first_text[i + 1] of `text`; `samples` (n,): their fingerprints, 0 where one cannot be used;
`image_check` (n,) and `text_check` (m,): `row_check` of each row, its sample's fingerprint and the caption's number.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sacl_ds.data.order import Place
from sacl_ds.data.sample import Sample
from sacl_ds.data.shards.patterns import is_remote
from sacl_ds.errors import UserError
from sacl_ds.files import row_check

BESIDE = "beside"
_OPEN = 128  # files kept open
_NAMED_BY = 12  # digits of the identity
_COMMAND = "run tools/precompute_teacher.py with this teacher and these shards"


@dataclass(frozen=True)
class FeatureFolder:
    """Location of the feature files of shards: beside each shard, or in one folder."""

    where: str  # a folder, or BESIDE
    identity: str  # the teacher's

    def path(self, shard: str) -> Path:
        """Raises UserError for a remote shard without a folder."""
        name = f"{Path(shard.partition('?')[0]).stem}.teacher-{self.identity[:_NAMED_BY]}.safetensors"
        if self.where != BESIDE:
            return Path(self.where) / name
        if is_remote(shard):
            raise UserError(f"features of {shard} cannot lie beside it; give a local folder")
        return Path(shard).with_name(name)

    def require(self, shards: Sequence[str]) -> None:
        """Raises UserError where a shard has no features of this teacher, or two would share a file."""
        taken: dict[Path, str] = {}
        for shard in shards:
            path = self.path(shard)
            if path in taken:
                raise UserError(
                    f"teacher.features={self.where}: {taken[path]} and {shard} would share {path.name}; "
                    f"use {BESIDE!r}, or name shards differently"
                )
            taken[path] = shard

    def require_all(self, shards: Sequence[str]) -> None:
        """Check `require`, and that every file exists."""
        self.require(shards)
        missing = [shard for shard in shards if not self.path(shard).is_file()]
        if not missing:
            return
        path = self.path(missing[0])
        others = sorted(p.name for p in path.parent.glob(f"{path.name.partition('.teacher-')[0]}.teacher-*"))
        why = f"those there are of another teacher ({others[0]})" if others else "there are none"
        more = f" (and {len(missing) - 1} more of {len(shards)})" if len(missing) > 1 else ""
        raise UserError(
            f"teacher.features={self.where}: no features of the teacher {self.identity[:_NAMED_BY]} for {missing[0]}"
            f"{more}: {why}; {_COMMAND}"
        )


@dataclass
class ShardFeatures:
    """Features of one shard, sample after sample."""

    image: list[np.ndarray]
    text: list[np.ndarray]  # of all captions of all samples
    captions: list[int]  # of each sample
    samples: list[int]  # fingerprints; 0: it could not be used

    def save(self, path: Path, identity: str) -> None:
        """Write the file atomically."""
        image, text = _rows(self.image), _rows(self.text)
        own = [int(sample) for sample in self.samples]
        of_texts = [(sample, n) for sample, count in zip(own, self.captions, strict=True) for n in range(count)]
        tensors: dict[str, np.ndarray] = {
            "image": image,
            "text": text,
            "image_check": _checks(image, [(sample, -1) for sample in own]),
            "text_check": _checks(text, of_texts),
            "first_text": np.concatenate([[0], np.cumsum(np.array(self.captions, np.int64))]).astype(np.int64),
            "samples": np.array(self.samples, np.uint64).view(np.int64),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors, temporary, metadata={"teacher": identity})
        temporary.replace(path)


class FeatureReader:
    """Reader of features by place, for the loader: rows are read from the files, nothing is held."""

    def __init__(self, folder: FeatureFolder, shards: Sequence[str]) -> None:
        self._folder, self._shards = folder, shards
        self._open: OrderedDict[int, Any] = OrderedDict()

    def of(self, place: Place, sample: Sample, caption: int) -> np.ndarray:
        """Return (2, d) float16: the features of the image, and of caption number `caption`. Raises UserError for
        another sample's."""
        file, at = self._file(place.shard), place.offset
        path = self._folder.path(self._shards[place.shard])
        try:
            known = file.get_slice("samples")
            same = at < known.get_shape()[0] and int(known[at : at + 1].view(np.uint64)[0]) == sample.fingerprint
            first = int(file.get_slice("first_text")[at : at + 1][0]) if same else 0
            found = []
            for name, row, number in (("image", at, -1), ("text", first + caption, caption)) if same else ():
                found.append(file.get_slice(name)[row : row + 1])
                if f"{name}_check" not in file.keys():  # noqa: SIM118 -- no mapping; of an older version
                    continue
                if file.get_slice(f"{name}_check")[row : row + 1] != _checks(found[-1], [(sample.fingerprint, number)]):
                    raise ValueError(f"the features of {sample.key} are not as they were written")
        except Exception as error:  # of a file with other tensors, or values that lead nowhere
            raise UserError(f"{path} is damaged ({error}); remove it and {_COMMAND}") from None
        if not same:
            raise UserError(
                f"{path} is of another version of its shard (sample {sample.key}); remove it and {_COMMAND}"
            )
        if any(each.dtype != np.float16 or each.shape != (1, found[0].size) for each in found):
            raise UserError(f"{path} is damaged (no row of features for {sample.key}); remove it and {_COMMAND}")
        return np.concatenate(found)

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            path = self._folder.path(self._shards[shard])
            try:
                file = safe_open(path, framework="np")
                said = (file.metadata() or {}).get("teacher")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}; remove it and {_COMMAND}") from None
            if said != self._folder.identity:
                raise UserError(f"{path} holds the features of another teacher; {_COMMAND}")
            self._open[shard] = file
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


def _checks(rows: np.ndarray, of: Sequence[tuple[int, int]]) -> np.ndarray:
    """of: (fingerprint, caption), a row each."""
    return np.array([row_check(repr(own).encode(), row.tobytes()) for own, row in zip(of, rows, strict=True)], np.int64)


def _rows(rows: list[np.ndarray]) -> np.ndarray:
    """Stack rows to (n, d) float16; empty ones are zeros."""
    width = max(map(len, rows), default=0)
    return np.array([row if len(row) else np.zeros(width) for row in rows], np.float16).reshape(len(rows), width)
