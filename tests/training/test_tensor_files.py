"""Files of tensors: what is written reads back to the bit, whole or by any range."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lines import is_one_line
from safetensors.torch import load_file

from sacl_ds.errors import UserError
from sacl_ds.files import Written, checksum
from sacl_ds.training.tensor_files import Entry, Fragments, fragment_name, write_entries

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
KEPT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)  # of tmp_path, overwritten


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any type and shape, any bits in it."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))).view(shape)
    size = count * dtype.itemsize
    bits = torch.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    made = bits.view(dtype).view(shape)
    return made.mT if draw(st.booleans()) and made.dim() > 1 else made  # as it may lie in memory


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@KEPT
@given(st.dictionaries(NAMES, tensors(), max_size=6))
def test_tensors_read_back_to_the_bit(tmp_path: Path, wanted: dict[str, torch.Tensor]) -> None:
    """By the library; and size and checksum are those of the file."""
    file = tmp_path / "x.safetensors"
    written = write_entries(file, [Entry.of(name, tensor) for name, tensor in wanted.items()])
    content = file.read_bytes()
    assert written == Written(len(content), hashlib.sha256(content).hexdigest()) == checksum(file)
    found = load_file(file)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)


def test_an_entry_that_is_not_as_announced(tmp_path: Path) -> None:
    entry = Entry("x", torch.float32, (3,), lambda: torch.zeros(4))
    with pytest.raises(ValueError, match="announced as"):
        write_entries(tmp_path / "x", [entry])


@st.composite
def in_pieces(draw: st.DrawFn) -> tuple[dict[tuple[str, str], torch.Tensor], list[tuple[str, str, int, int, int]]]:
    """Parameters, and pieces that cover each of them once: (kind, name, start, end, file)."""
    whole, pieces = {}, []
    for number, name in enumerate(draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))):
        for kind in draw(st.sampled_from([["weight"], ["weight", "exp_avg"]])):
            size = draw(st.integers(0, 30))
            whole[kind, name] = torch.arange(size, dtype=torch.float32) + 1000 * number
            cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=6))})
            files = st.integers(0, 3)
            pieces += [(kind, name, a, b, draw(files)) for a, b in itertools.pairwise(cuts)]
    return whole, draw(st.permutations(pieces))


@KEPT
@given(in_pieces(), st.data())
def test_any_range_of_any_pieces(tmp_path: Path, made: Any, data: st.DataObject) -> None:
    whole, pieces = made
    lost = data.draw(st.sampled_from([None, *pieces]))
    paths = []
    for number in range(4):
        own = [(k, n, a, b) for k, n, a, b, file in pieces if file == number and (k, n, a, b, file) != lost]
        paths.append(tmp_path / f"rank_{number}.safetensors")
        write_entries(paths[-1], [Entry.of(fragment_name(k, n, a), whole[k, n][a:b]) for k, n, a, b in own])
    found = Fragments(paths)
    for (kind, name), tensor in whole.items():
        start = data.draw(st.integers(0, len(tensor)))
        count = data.draw(st.integers(0, len(tensor) - start))
        if lost and lost[:2] == (kind, name) and count and start < lost[3] and lost[2] < start + count:
            with pytest.raises(UserError, match=f"lacks {kind} {max(start, lost[2])} to {start + count} of ") as raised:
                found.read(kind, name, start, count)
            assert is_one_line(raised.value)
        else:
            assert torch.equal(found.read(kind, name, start, count), tensor[start : start + count])
            if not lost:
                assert torch.equal(found.whole(kind, {name: (1, len(tensor))})[name], tensor[None])
    assert not found.holds("weight", "a name that is too long")
