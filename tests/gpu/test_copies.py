"""Copies beside the GPU's work: what arrives is what was sent, in order, also where the GPU is late."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from sacl_ds.data.batch import ahead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_copied_while_the_gpu_works() -> None:
    device = torch.device("cuda")
    whole = [tiny.batch(64, seed=number)[0] for number in range(12)]
    sums = []
    for batch in ahead(whole, device):
        torch.cuda._sleep(20_000_000)  # the kernels that read the batch come long after the next copy has begun
        sums.append(batch.images.long().sum() + 7 * batch.input_ids.sum())
        del batch
    wanted = [int(batch.images.long().sum() + 7 * batch.input_ids.sum()) for batch in whole]
    assert [int(found) for found in sums] == wanted


def test_a_failure_waits_for_the_batches_before_it() -> None:
    taken: list[int] = []
    batches = ahead(tiny.failing(taken, 3), torch.device("cuda"))
    for number in range(3):
        assert torch.equal(next(batches).images.cpu(), tiny.batch(2, seed=number)[0].images)
        assert taken == list(range(min(number + 2, 3)))
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_the_end() -> None:
    assert list(ahead(iter(()), torch.device("cuda"))) == []
    assert len(list(ahead([tiny.batch(2)[0]], torch.device("cuda")))) == 1


def test_what_lies_there_already_is_taken_as_it_is() -> None:
    device = torch.device("cuda")
    whole = tiny.batch(8)[0]
    there, half = whole.to(device), replace(whole, pair_ids=whole.pair_ids.to(device))
    for batch in ahead([there, half], device):
        assert all(tensor.is_cuda for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor))
        assert torch.equal(batch.images.cpu(), whole.images)
        assert torch.equal(batch.pair_ids.cpu(), whole.pair_ids)
