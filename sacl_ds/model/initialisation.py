"""Initial weights of an image encoder trained from scratch."""

from __future__ import annotations

from torch import nn


def initialise(module: nn.Module, gain: float) -> None:
    """Draw linear weights from a normal with deviation gain / sqrt(inputs); biases are 0, all else is untouched.

    The 0.02 of BERT and timm is meant for width 768. At width 128 it makes the towers nearly linear, and a model whose
    features are sums over words and patches learns which colours and shapes there are, but for a long time not which
    goes with which (docs/lab/log.md).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=gain * part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
