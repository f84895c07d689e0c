"""Speed of training and use of the device: metrics of every logged step, and of the run.

FLOPs are the model's: forward and backward of what the run trains, for tokens that are there, once. What is computed
besides (a frozen teacher, an average, padding, activations or features a second time) takes time and adds none, so that
what saves work shows, and what repeats it does not.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_PEAK = "memory_peak_bytes"
WARM_UP = 5  # steps in which memory is claimed and kernels are compiled; medians of a run leave them out
_LENGTHS = (8, 16, 24)


class RowFlops(NamedTuple):
    """Training FLOPs of a row whose text has t tokens: fixed + linear t + square t^2, as for transformers."""

    fixed: float
    linear: float
    square: float

    @classmethod
    def through(cls, flops: Callable[[int], float]) -> RowFlops:
        """Fit the polynomial in the text's length to the FLOPs at three lengths."""
        (a, b, c), step = (flops(tokens) for tokens in _LENGTHS), _LENGTHS[1] - _LENGTHS[0]
        square = (c - 2 * b + a) / (2 * step**2)
        linear = (b - a) / step - square * (_LENGTHS[0] + _LENGTHS[1])
        return cls(a - linear * _LENGTHS[0] - square * _LENGTHS[0] ** 2, linear, square)

    def of(self, rows: float, tokens: float, squares: float) -> float:
        """FLOPs of `rows` rows, given the sum of their token counts and of the squares of those."""
        return self.fixed * rows + self.linear * tokens + self.square * squares


@dataclass
class Throughput:
    """Speed and FLOPs of one training. rows: what a row of its batches is called. flops: None where not known."""

    rows: str
    device: torch.device
    world: int
    flops: RowFlops | None = None
    peak: float | None = None  # FLOP/s of a device; None: not known
    _lengths: Tensor = field(init=False)
    _logged: list[tuple[int, dict[str, float]]] = field(default_factory=list, init=False)  # (steps done, figures)

    def __post_init__(self) -> None:
        self._lengths = torch.zeros(3, dtype=torch.float64, device=self.device)

    def add(self, attention_mask: Tensor) -> None:
        """Add the (b, L) mask of a step's texts on this rank. Nothing waits for the device."""
        tokens = attention_mask.sum(1).double()
        found = torch.stack([torch.ones_like(tokens).sum(), tokens.sum(), tokens.square().sum()])
        self._lengths += found.to(self.device, non_blocking=True)

    def lengths(self) -> Tensor:
        """Return and reset the sums since the last call, on this rank: (3,) float64 rows, tokens, squares of tokens a
        row."""
        found, self._lengths = self._lengths, torch.zeros_like(self._lengths)
        return found

    def settle(self, done: int, steps: int, seconds: float, batch: int, lengths: Tensor) -> dict[str, float]:
        """Compute metrics of the last `steps` steps, `done` in all, which took so many seconds.

        batch: rows a step, of all ranks. lengths: `lengths` of all ranks, added up.
        """
        per_second = batch * steps / seconds
        figures = {
            "step_seconds": seconds / steps,
            f"{self.rows}_per_second": per_second,
            f"{self.rows}_per_second_per_device": per_second / self.world,
        }
        rows, tokens, squares = lengths.tolist()
        if self.flops is not None and rows:
            flops = self.flops.of(rows, tokens, squares) / seconds / self.world
            figures |= {"text_tokens": tokens / rows, "flops_per_second": flops}
            if self.peak is not None:
                figures["mfu"] = flops / self.peak
        self._logged.append((done, figures))
        return figures

    def more(self, figures: dict[str, float]) -> None:
        """Add further metrics of the steps that were settled last."""
        self._logged[-1][1].update(figures)

    def medians(self) -> dict[str, float]:
        """Return medians over the logged steps after this process's first WARM_UP steps, or over all where there are
        none.

        Memory is the maximum.
        """
        if not self._logged:
            return {}
        first = self._logged[0][0]
        used = [figures for done, figures in self._logged if done >= first + WARM_UP]
        used = used or [figures for _, figures in self._logged]
        return {name: (max if name == _PEAK else statistics.median)(each[name] for each in used) for name in used[0]}

    def summary(self) -> str | None:
        """Format the medians as a line; None where nothing was logged."""
        found = self.medians()
        if not found:
            return None
        rate = f"{self.rows}_per_second"
        parts = [f"{found[rate]:.4g} {self.rows}/s"]
        if self.world > 1:
            parts[0] += f" ({found[f'{rate}_per_device']:.4g} a device)"
        parts.append(f"{found['step_seconds']:.3g} s a step")
        if "flops_per_second" in found:
            parts.append(f"{flops_text(found['flops_per_second'])}/s a device")
        if "mfu" in found:
            parts.append(f"MFU {found['mfu']:.1%}")
        if _PEAK in found:
            parts.append(f"{found[_PEAK] / 1e9:.3g} GB at the peak")
        if "data_wait_share" in found:
            parts.append(f"{found['data_wait_share']:.0%} of the time waiting for data")
        return f"{', '.join(parts)} (medians)"


def flops_text(flops: float) -> str:
    """Format FLOPs in the unit that suits: '41.2 GFLOP'."""
    units = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}
    name, unit = next(((name, unit) for name, unit in units.items() if flops >= unit), ("M", 1e6))
    return f"{flops / unit:.3g} {name}FLOP"


def device_peak(device: torch.device, precision: str) -> float | None:
    """Return the device's dense FLOP/s as a run of that precision (fp32, bf16, fp16) uses it; None where unknown.

    fp32 counts as tf32 where PyTorch may use that for matrix products.
    """
    if device.type != "cuda":
        return None
    from sacl_ds.telemetry.peaks import dense_peak

    name = torch.cuda.get_device_name(device)
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return (dense_peak(name, "tf32") if tf32 else None) or dense_peak(name, precision)


def take_memory_peak(device: torch.device) -> int:
    """Return the peak bytes: of tensors on a GPU since the last call, else the process's greatest resident size."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
