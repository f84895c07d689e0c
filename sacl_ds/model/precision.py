"""Reduced precision for passes that no engine runs: teacher, momentum model, evaluation."""

from __future__ import annotations

import torch

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What `train.precision` means to the engine: products in half precision; parameters and sums stay float32."""
    return torch.autocast(device.type, _HALF.get(precision, torch.bfloat16), enabled=precision in _HALF)
