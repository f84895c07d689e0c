"""Arrays and weights that a study keeps in its folder and finds there again, or refuses where they have changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from sacl_ds.files import require_unchanged, seal
from sacl_ds.model.saved import read_tensors, write_tensors


def keep_array(array: np.ndarray, path: Path) -> None:
    """Atomically, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.save(file, array)
    temporary.replace(path)
    seal(path.parent, (path.name,))


def kept_array(path: Path) -> np.ndarray:
    """Raises UserError."""
    require_unchanged(path.parent, str(path.parent), path.name)
    array: np.ndarray = np.load(path, allow_pickle=False)
    return array


def keep_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Atomically, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(dict(tensors), path)
    seal(path.parent, (path.name,))


def kept_tensors(path: Path) -> dict[str, Tensor]:
    """Raises UserError."""
    require_unchanged(path.parent, str(path.parent), path.name)
    return read_tensors(path, str(path.parent))
