"""The queue is the last so many pairs, however they come."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sacl_ds.model.momentum import Queue


@given(st.integers(0, 9), st.lists(st.integers(0, 13), max_size=12), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_it_holds_the_newest(size: int, batches: list[int], saved_after: int) -> None:
    """Batches of any length, longer ones than the queue too; saved and restored on the way."""
    queue, pushed = Queue(size), 0
    for number, count in enumerate(batches):
        if number == saved_after:
            state = {name: value.clone() for name, value in queue.state().items()}
            queue = Queue(size)
            queue.restore(state)
        ids = torch.arange(pushed, pushed + count)
        queue.push({"ids": ids[:, None], "image": ids[:, None].float() * torch.ones(3)})
        pushed += count
        expected = list(range(max(0, pushed - size), pushed))
        assert queue.filled == len(expected)
        held, image = queue["ids"], queue["image"]
        if held is None or image is None:
            assert not expected
            continue
        assert sorted(held[:, 0].tolist()) == expected
        assert torch.equal(image, held.float().expand(-1, 3))


def test_equal_pushes_give_equal_bits_and_places() -> None:
    """What ranks rely on: the same pushes, the same ring."""
    a, b = Queue(5), Queue(5)
    for start in range(0, 21, 3):
        rows = {"image": torch.arange(start, start + 3.0)[:, None]}
        a.push(rows)
        b.push(rows)
        assert torch.equal(a["image"], b["image"])
    # 21 rows went into 5 places: number 20 lies in place 20 mod 5
    assert a["image"][:, 0].tolist() == [20, 16, 17, 18, 19]
