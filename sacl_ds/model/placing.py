"""Loading of weights into a model: each from its source and finite, or one error line; none by chance unnoticed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sacl_ds.errors import UserError

_WHOLE = "give weights that are whole"
_NO_WEIGHTS = {  # beginnings of files that often lie where weights should, in lower case
    b"version https://git-lfs": "a pointer of Git LFS, in place of the file (git lfs pull fetches it)",
    b"<!doctype html": "an HTML page, which a download brought in place of the file",
    b"<html": "an HTML page, which a download brought in place of the file",
    b"\x1f\x8b": "gzipped (gunzip unpacks it)",
}


def require_weights(file: Path, source: str) -> None:
    """Raises UserError where `file` begins like something that is often found in the place of weights, or is empty."""
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except OSError as error:
        raise UserError(f"{source}: {file.name} cannot be read: {error.strerror or error}") from None
    start = start.lstrip().lower()
    found = next((said for known, said in _NO_WEIGHTS.items() if start.startswith(known)), None if start else "empty")
    if found:
        raise UserError(f"{source}: {file.name} is no file of weights; it is {found}")


def require_shapes(model: nn.Module, tensors: Mapping[str, Tensor], source: str, remedy: str) -> None:
    """Raises UserError at the first of `tensors` whose shape is not that of the model's tensor of that name."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own and own[name].shape != tensor.shape:
            there, here = (" × ".join(map(str, t.shape)) or "a number" for t in (tensor, own[name]))
            raise UserError(f"{source}: {name} is {there} there and {here} in the model; {remedy}")


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError at the first of `tensors` that holds NaN or an infinite number."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{source}: {name} holds numbers that are not finite; {_WHOLE}")


def require_none_lacking(lacking: Collection[str], source: str, instead: Iterable[str] = ()) -> None:
    """Raises UserError where names of the model are in no source. instead: names there that the model lacks."""
    if lacking:
        first, more = min(lacking), f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        other = next(iter(instead), None)
        found = f" (instead there is {other[:80]!r})" if other else ""
        raise UserError(f"{source}: it lacks {first}{more} of the model's tensors{found}; {_WHOLE}")


def require_parts(
    model: nn.Module, loaded: Collection[str], source: str, needed: tuple[str, ...] = ("",), new: str | None = None
) -> None:
    """Raises UserError where a part of the model is loaded by halves, or not at all though it is `needed`.

    A part is what shares the beginning of its names up to the first dot. needed: beginnings of names. new: what stands
    in names that may be new, all of them.
    """
    begun = {name.partition(".")[0] for name in loaded}
    if new and any(new in name for name in loaded):
        new = None
    lacking = [
        name
        for name in model.state_dict().keys() - set(loaded)
        if (name.startswith(needed) or name.partition(".")[0] in begun) and not (new and new in name)
    ]
    require_none_lacking(lacking, source)


@torch.no_grad()
def place(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> tuple[list[str], list[str]]:
    """Copy tensors of fitting shapes to the model's of that name; returns (names copied, names that it lacks).

    Raises UserError, before any is copied, where a number is not finite.
    """
    own = model.state_dict()
    placed = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items() if name in own}
    require_finite(placed, source)
    for name, tensor in placed.items():
        own[name].copy_(tensor)
    return list(placed), [name for name in tensors if name not in own]


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str, unfit: str) -> None:
    """Load all of the model's tensors from `tensors`, which hold nothing else.

    unfit: what the error line says of weights of another model. Raises UserError for those, and for numbers that are
    not finite.
    """
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}{unfit}: {reason}") from None
    require_finite(model.state_dict(), source)
