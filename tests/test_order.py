"""The global order: every sample once an epoch, the same from any position, whatever the shards look like."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sacl_ds.data.order import GlobalOrder


def stream_samples(order: GlobalOrder, stream: int, position: int, count: int) -> list[tuple[int, int, int]]:
    """What a stream serves from a position on: (epoch, shard, offset)."""
    served = (
        (places[i].epoch, places[i].shard, places[i].offset)
        for places, serve, skip in order.blocks(stream, position)
        for i in serve[skip:]
    )
    return list(islice(served, count))


shards = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)


@given(shards, st.integers(1, 24), st.integers(1, 9), st.integers(1, 13), st.integers(0, 2**16))
@settings(max_examples=150, deadline=None)
def test_every_sample_exactly_once_an_epoch(counts: list[int], batch: int, streams: int, block: int, seed: int) -> None:
    order = GlobalOrder(counts, batch, seed, streams, block)
    total, epochs = sum(counts), 3
    seen: dict[int, list[tuple[int, int]]] = {epoch: [] for epoch in range(epochs + 1)}
    for stream in range(order.streams):
        enough = -(-total * epochs // order.streams) + 2
        for epoch, shard, offset in stream_samples(order, stream, 0, enough):
            seen.setdefault(epoch, []).append((shard, offset))
    expected = sorted((shard, offset) for shard, count in enumerate(counts) for offset in range(count))
    for epoch in range(epochs):
        assert sorted(seen[epoch]) == expected


@given(shards, st.integers(1, 16), st.integers(1, 5), st.integers(1, 9), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_any_position_continues_the_same_sequence(
    counts: list[int], batch: int, streams: int, block: int, position: int
) -> None:
    order = GlobalOrder(counts, batch, 7, streams, block)
    for stream in range(order.streams):
        whole = stream_samples(order, stream, 0, position + 20)
        assert stream_samples(order, stream, position, 20) == whole[position:]


def test_epochs_and_seeds_differ_and_streams_keep_pace() -> None:
    order = GlobalOrder([100] * 10, 32, 0, streams=8, shuffle_buffer=50)
    first, second = stream_samples(order, 3, 0, 125), stream_samples(order, 3, 125, 125)
    assert [s[0] for s in first] == [0] * 125
    assert [s[0] for s in second] == [1] * 125
    assert [s[1:] for s in first] != [s[1:] for s in second]
    other = GlobalOrder([100] * 10, 32, 1, streams=8, shuffle_buffer=50)
    assert stream_samples(other, 3, 0, 125) != first


def test_places_of_a_block_lie_front_to_back() -> None:
    order = GlobalOrder([7, 0, 13, 5], 4, 3, streams=2, shuffle_buffer=6)
    for places, serve, _ in islice(order.blocks(1), 10):
        assert sorted(serve) == list(range(len(places)))
        for a, b in pairwise(places):
            assert a.shard != b.shard or b.offset == a.offset + 1


def test_neighbours_in_a_shard_are_spread() -> None:
    """Samples next to each other in a shard end up in the same batch little more often than chance."""
    order = GlobalOrder([500] * 20, 64, 0, streams=16, shuffle_buffer=256)
    batch_of: dict[tuple[int, int], int] = {}
    for stream in range(16):
        for number, (_, shard, offset) in enumerate(stream_samples(order, stream, 0, 625)):
            batch_of[shard, offset] = number // order.slots_per_stream
    together = np.mean([batch_of[s, o] == batch_of[s, o + 1] for s in range(20) for o in range(499)])
    # within a stream: 4 slots a step out of a block of 256
    assert together < 2 * 4 / 256


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        GlobalOrder([0, 0], 4, 0)
