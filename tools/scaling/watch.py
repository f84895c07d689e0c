"""Measurement of what a training step sends and holds, by PyTorch's dispatcher and its allocator.

Nothing here knows the formulas of `memory` and `wire`, nor how the step is made; it is what they are checked against.
"""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's operators -> the collective and which of its arguments is the whole, of which ranks hold or get parts
_COLLECTIVES = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "alltoall_base_": ("all-to-all", 1),
    "alltoall_": ("all-to-all", 1),
}
_SILENT = ("barrier", "monitored_barrier_", "recv_", "recv_any_source_", "send")


class SeenOnTheWire(TorchDispatchMode):
    """Counts payload bytes of the collectives that are started inside: those of the whole tensor, as every rank hands
    it over (all-reduce, reduce-scatter) or receives it (all-gather).

    payload: {(collective, dtype): bytes}. Raises ValueError for one it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple[Any, ...]) -> None:
        if operator in _SILENT:
            return
        if operator not in _COLLECTIVES:
            raise ValueError(f"c10d::{operator} is no collective that is counted")
        collective, place = _COLLECTIVES[operator]
        for tensor in tree_leaves(args[place]):
            self.payload[collective, tensor.dtype] += tensor.nbytes

    def total(self, collective: str) -> int:
        """Payload bytes of a collective, over all dtypes."""
        return sum(count for (name, _), count in self.payload.items() if name == collective)


@dataclass
class Allocations:
    """Bytes of CPU memory that tensors take while it runs, on top of what there was: the curve and named moments."""

    curve: list[int] = field(default_factory=list)  # after every allocation and release, in order
    marks: dict[str, int] = field(default_factory=dict)  # places in the curve of the moments that `mark` named

    def at(self, mark: str) -> int:
        """Bytes held at that moment."""
        return self.curve[self.marks[mark] - 1] if self.marks[mark] else 0

    def peak(self, start: str, stop: str) -> int:
        """Most bytes held between two moments."""
        return max(self.curve[max(self.marks[start] - 1, 0) : self.marks[stop]], default=0)


def allocations(work: Callable[[Callable[[str], None]], None]) -> Allocations:
    """Record what `work(mark)` allocates through PyTorch's CPU allocator; mark(name) notes the bytes held then.

    What gloo and C++ libraries take for themselves is not seen, nor the release of what was there before.
    """
    with _all_threads_counted(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:

        def mark(name: str) -> None:
            with torch.profiler.record_function(f"mark: {name}"):
                pass

        work(mark)
    assert profiler.profiler is not None
    events = _flat(profiler.profiler.kineto_results.experimental_event_tree())
    found, before = Allocations(), None
    for event in sorted(events, key=lambda event: int(event.start_time_ns)):
        if event.name == "[memory]":
            taken = event.extra_fields
            before = taken.total_allocated - taken.alloc_size if before is None else before
            found.curve.append(taken.total_allocated - before)
        elif event.name.startswith("mark: "):
            found.marks[event.name.removeprefix("mark: ")] = len(found.curve)
    return found


def _flat(tree: list[Any]) -> Iterator[Any]:
    left = list(tree)
    while left:
        event = left.pop()
        left += event.children
        yield event


@contextmanager
def _all_threads_counted() -> Iterator[None]:
    """PyTorch's running total of CPU memory takes in what threads do that are not profiled, too: gloo's release what an
    asynchronous collective sent. There is no other way to set this flag from Python."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    flag = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")
    flag.value = True
    try:
        yield
    finally:
        flag.value = False


def live_tensors() -> dict[int, int]:
    """Return {storage: its bytes} of the CPU tensors that Python knows."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            found[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under the tensors."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
