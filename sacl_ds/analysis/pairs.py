"""Features of image-text pairs with their identities: in memory, or mapped from a folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import torch
from pyarrow import parquet
from safetensors.numpy import save_file

from sacl_ds.errors import UserError
from sacl_ds.files import require_unchanged, seal
from sacl_ds.losses import Regulation
from sacl_ds.losses.weights import log_weights

FEATURES, SAMPLES, FIGURES = "features.safetensors", "samples.parquet", "features.json"
_FILES = FEATURES, SAMPLES, FIGURES
_ARRAYS = ("image", "text", "teacher_image", "teacher_text", "pair_ids")
_TEXTS = {"keys": "key", "shards": "shard", "captions": "caption", "sha256": "sha256", "urls": "url"}
_LONGEST_HEADER = 1 << 20  # bytes
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}


@dataclass(frozen=True)
class Pairs:
    """n pairs, one caption each. Features are unit vectors, float32; row i of all arrays is pair i."""

    keys: list[str]
    shards: list[str]
    captions: list[str]
    image: np.ndarray  # (n, d)
    text: np.ndarray  # (n, d)
    teacher_image: np.ndarray | None  # (n, d_t)
    teacher_text: np.ndarray | None  # (n, d_t)
    pair_ids: np.ndarray  # (n, k) int64; a match in any column means that two pairs are not negatives of each other
    logit_scale: float
    sha256: list[str] = field(default_factory=list)  # of the image file; '' or an empty list where unknown
    urls: list[str] = field(default_factory=list)  # likewise
    skipped: int = 0  # samples that could not be used

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def teacher(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The teacher's (image, text) features."""
        if self.teacher_image is None or self.teacher_text is None:
            return None
        return self.teacher_image, self.teacher_text

    def take(self, indices: Sequence[int] | np.ndarray) -> Pairs:
        """Return the pairs at `indices`, in that order, in memory."""
        rows = np.asarray(indices, np.int64)

        def texts(values: list[str]) -> list[str]:
            return [values[row] for row in rows] if values else []

        def arrays(values: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(values[rows])

        return Pairs(
            texts(self.keys),
            texts(self.shards),
            texts(self.captions),
            arrays(self.image),
            arrays(self.text),
            None if self.teacher_image is None else arrays(self.teacher_image),
            None if self.teacher_text is None else arrays(self.teacher_text),
            arrays(self.pair_ids),
            self.logit_scale,
            texts(self.sha256),
            texts(self.urls),
        )

    def save(self, folder: Path) -> None:
        """Write features.safetensors, samples.parquet and features.json into `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: value for name in _ARRAYS if (value := getattr(self, name)) is not None}
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, folder / FEATURES)
        n = len(self)
        columns = {column: getattr(self, name) or [""] * n for name, column in _TEXTS.items()}
        parquet.write_table(arrow.table(columns), folder / SAMPLES)
        figures = {"pairs": n, "logit_scale": self.logit_scale, "skipped": self.skipped}
        (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")
        seal(folder, _FILES)

    @classmethod
    def load(cls, folder: str | Path) -> Pairs:
        """Open a folder written by `save`; arrays are mapped, so that only what is used is read. Raises UserError."""
        folder = Path(folder)
        require_unchanged(folder, str(folder), *_FILES)
        try:
            arrays = _mapped(folder / FEATURES)
            figures = json.loads((folder / FIGURES).read_text())
            table = parquet.read_table(folder / SAMPLES)
            texts = {name: table.column(column).to_pylist() for name, column in _TEXTS.items()}
            pairs = cls(
                **texts,
                **{name: arrays.get(name) for name in _ARRAYS},  # type: ignore[arg-type]
                logit_scale=float(figures["logit_scale"]),
                skipped=int(figures["skipped"]),
            )
        except Exception as error:  # three formats, each with errors of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{folder} holds no features that can be read ({reason}); make them again") from None
        missing = [name for name in ("image", "text", "pair_ids") if name not in arrays]
        if any(array.ndim != 2 or (array.dtype.kind == "i") != (name == "pair_ids") for name, array in arrays.items()):
            raise UserError(f"{folder / FEATURES}: no tables of features and ids; make the features again")
        for one, other in (("image", "text"), ("teacher_image", "teacher_text")):
            if one in arrays and other in arrays and arrays[one].shape[1] != arrays[other].shape[1]:
                raise UserError(f"{folder / FEATURES}: {one} and {other} differ in width; make the features again")
        if missing or any(len(array) != len(pairs) for array in arrays.values()):
            what = f"no {missing[0]}" if missing else f"not {len(pairs)} rows everywhere"
            raise UserError(f"{folder / FEATURES}: {what}; make the features again")
        return pairs


def is_features(path: str | Path) -> bool:
    """Return whether a folder was written by `Pairs.save`."""
    return (Path(path) / FEATURES).is_file()


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped copy-on-write: the library would read them whole."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        shape, offset = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        dtype = _DTYPES[entry["dtype"]]
        if not np.prod(shape):
            arrays[name] = np.zeros(shape, dtype)
            continue
        arrays[name] = np.memmap(path, dtype, "c", offset, shape)
    return arrays


@dataclass(frozen=True)
class MiniBatch:
    """Weights of b pairs among each other: float64 (b, b), rows are anchors, 0 where a column is no negative.

    Row i, column j: `image_to_text` image i and text j, `text_to_image` text i and image j. `student`, `teacher`:
    cosines of image i and text j. `negatives`: symmetric, False on the diagonal and for duplicates.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray
    negatives: np.ndarray  # bool
    student: np.ndarray
    teacher: np.ndarray | None

    def weights(self, direction: str) -> np.ndarray:
        return self.image_to_text if direction == "image_to_text" else self.text_to_image


def negatives_of(pair_ids: np.ndarray) -> np.ndarray:
    """(b, b) bool, from (b, k) ids: pairs that share no id in any column."""
    return ~(pair_ids[:, None] == pair_ids[None]).any(-1) & ~np.eye(len(pair_ids), dtype=bool)


def mini_batch(pairs: Pairs, regulation: Regulation) -> MiniBatch:
    """Weights of all `pairs` as one mini-batch, b * b numbers at a time. Without teacher features alpha counts as 0."""
    teacher = None
    if pairs.teacher is not None:
        teacher = _cosine(*pairs.teacher)
    else:
        regulation = replace(regulation, alpha=0.0)
    student, negatives = _cosine(pairs.image, pairs.text), torch.from_numpy(negatives_of(pairs.pair_ids))
    of_images = log_weights(student, negatives, regulation, teacher).exp().numpy()
    of_texts = log_weights(student.T, negatives, regulation, None if teacher is None else teacher.T).exp().numpy()
    of_teacher = None if teacher is None else teacher.numpy()
    return MiniBatch(of_images, of_texts, negatives.numpy(), student.numpy(), of_teacher)


def _cosine(image: np.ndarray, text: np.ndarray) -> torch.Tensor:
    image, text = (np.ascontiguousarray(side, np.float64) for side in (image, text))
    return torch.from_numpy(image) @ torch.from_numpy(text).T
