"""Batches come in order, and so does what goes wrong; on a CPU nothing is taken before it is asked for."""

from __future__ import annotations

import pytest
import tiny
import torch

from sacl_ds.data.batch import ahead

CPU = torch.device("cpu")


def test_all_in_order() -> None:
    whole = [tiny.batch(2, seed=number)[0] for number in range(5)]
    found = list(ahead(whole, CPU))
    assert len(found) == 5
    for mine, theirs in zip(found, whole, strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert mine.captions == theirs.captions
        assert mine.images.data_ptr() == theirs.images.data_ptr(), "copied"
    assert list(ahead(iter(()), CPU)) == []


def test_errors_in_their_place() -> None:
    taken: list[int] = []
    batches = ahead(tiny.failing(taken, 2), CPU)
    assert taken == []
    for number in range(2):
        assert torch.equal(next(batches).images, tiny.batch(2, seed=number)[0].images)
        assert taken == list(range(number + 1))
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_only_what_lies_on_the_host_is_page_locked() -> None:
    elsewhere = tiny.batch(2)[0].to(torch.device("meta"))
    assert elsewhere.pin_memory().images.is_meta
