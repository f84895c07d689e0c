"""Copying tensors into a model, all or none of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sacl_ds.errors import UserError


def require_shapes(model: nn.Module, tensors: Mapping[str, Tensor], source: str, remedy: str) -> None:
    """Raises UserError at the first of `tensors` whose shape is not that of the model's tensor of that name."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own and own[name].shape != tensor.shape:
            there, here = (" × ".join(map(str, t.shape)) or "a number" for t in (tensor, own[name]))
            raise UserError(f"{source}: {name} is {there} there and {here} in the model; {remedy}")


@torch.no_grad()
def place(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copy tensors of fitting shapes into the model's own of that name: (names copied, names that it lacks)."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own:
            own[name].copy_(tensor)
    return [name for name in tensors if name in own], [name for name in tensors if name not in own]
