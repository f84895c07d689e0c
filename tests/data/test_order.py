"""The global order: every sample once an epoch, the same from any position, whatever the shards look like."""

import time
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sacl_ds.data.order import SUBSTITUTES, TRIES_IN_A_SHARD, Cycle, GlobalOrder, Place, spread

Served = tuple[int, int, int]


def stream_samples(order: GlobalOrder, stream: int, position: int, count: int, number: int = 0) -> list[Served]:
    """What a stream serves of one set from a position on: (epoch, shard, offset)."""
    served = (
        (block.places[i].epoch, block.places[i].shard, block.places[i].offset)
        for block in order.blocks(stream, number, position)
        for i in block.serve
    )
    return list(islice(served, count))


def mixed(order: GlobalOrder, stream: int, position: int, count: int) -> list[Served]:
    """What a stream of several sets serves."""
    sets = list(islice(order.sets(stream, position), count))
    of = {m: iter(stream_samples(order, stream, position, sets.count(m), m)) for m in set(sets)}
    return [next(of[m]) for m in sets]


shards = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)


@given(shards, st.integers(1, 24), st.integers(1, 9), st.integers(1, 60), st.integers(0, 2**16))
@settings(max_examples=150, deadline=None)
def test_every_sample_exactly_once_an_epoch(
    counts: list[int], batch: int, streams: int, buffer: int, seed: int
) -> None:
    order = GlobalOrder([counts], batch, seed, streams, buffer)
    total, epochs = sum(counts), 3
    seen: dict[int, list[tuple[int, int]]] = {epoch: [] for epoch in range(epochs + 1)}
    for stream in range(order.streams):
        enough = -(-total * epochs // order.streams) + 2
        for epoch, shard, offset in stream_samples(order, stream, 0, enough):
            seen.setdefault(epoch, []).append((shard, offset))
    expected = sorted((shard, offset) for shard, count in enumerate(counts) for offset in range(count))
    for epoch in range(epochs):
        assert sorted(seen[epoch]) == expected


@given(shards, shards, st.integers(1, 16), st.integers(1, 5), st.integers(1, 40), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_any_position_continues_the_same_sequence(
    counts: list[int], others: list[int], batch: int, streams: int, buffer: int, position: int
) -> None:
    order = GlobalOrder([counts, others], batch, 7, streams, buffer, weights=[1, 2.5])
    for stream in range(order.streams):
        whole = mixed(order, stream, 0, position + 20)
        assert mixed(order, stream, position, 20) == whole[position:]


@given(st.integers(1, 30), st.integers(1, 24), st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_sets_smaller_than_the_streams(total: int, streams: int, position: int) -> None:
    """A stream that has nothing to serve in most epochs: any position continues, and each epoch is served once."""
    order = GlobalOrder([[total]], streams, 3, streams, 2 * streams)
    served: dict[int, list[int]] = {}
    for stream in range(streams):
        whole = stream_samples(order, stream, 0, position + 3)
        assert stream_samples(order, stream, position, 3) == whole[position:]
        for epoch, _, offset in stream_samples(order, stream, 0, 2 * total):  # 2 * streams epochs
            served.setdefault(epoch, []).append(offset)
    assert len(served) == 2 * streams
    assert all(sorted(offsets) == list(range(total)) for offsets in served.values())


def test_streams_keep_pace_over_many_epochs() -> None:
    order = GlobalOrder([[1003]], 64, 0, 64, 640)
    epochs = [stream_samples(order, stream, 1003 * 40 // 64, 1)[0][0] for stream in range(64)]
    assert max(epochs) - min(epochs) <= 1


@given(st.integers(2, 24), st.integers(1, 5), st.integers(0, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_parts_of_a_stream_make_up_the_whole(batch: int, streams: int, position: int, data: st.DataObject) -> None:
    """What a reader that wants some slots gets is what stands in these slots."""
    order = GlobalOrder([[30, 11]], batch, 7, streams, 12)
    width = order.slots_per_stream
    low = data.draw(st.integers(0, width - 1))
    high = data.draw(st.integers(low + 1, width))
    whole = stream_samples(order, 0, position, 80)
    expected = [s for number, s in enumerate(whole, position) if low <= number % width < high]
    served = (block.places[i] for block in order.blocks(0, 0, position, low, high) for i in block.serve)
    assert [(p.epoch, p.shard, p.offset) for p in islice(served, len(expected))] == expected


def test_epochs_and_seeds_differ_and_streams_keep_pace() -> None:
    order = GlobalOrder([[100] * 10], 32, 0, streams=8, shuffle_buffer=400)
    first, second = stream_samples(order, 3, 0, 125), stream_samples(order, 3, 125, 125)
    assert [s[0] for s in first] == [0] * 125
    assert [s[0] for s in second] == [1] * 125
    assert [s[1:] for s in first] != [s[1:] for s in second]
    other = GlobalOrder([[100] * 10], 32, 1, streams=8, shuffle_buffer=400)
    assert stream_samples(other, 3, 0, 125) != first


def test_places_of_a_block_lie_front_to_back() -> None:
    order = GlobalOrder([[7, 0, 13, 5]], 4, 3, streams=2, shuffle_buffer=12)
    for block in islice(order.blocks(1, 0), 10):
        assert sorted(block.serve) == list(range(len(block.places)))
        for a, b in pairwise(block.places):
            assert a.shard != b.shard or b.offset == a.offset + 1


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_spread_keeps_neighbours_apart(count: int, apart: int, seed: int) -> None:
    order = spread(count, apart, seed)
    assert sorted(order) == list(range(count))
    place = np.empty(count, int)
    place[order] = np.arange(count)
    near = np.flatnonzero(np.abs(np.diff(place)) < min(apart, count))
    # cuts between stretches are the exceptions
    assert len(near) <= min(apart, count) - 1


@pytest.mark.parametrize(("batch", "streams"), [(64, 16), (512, 64), (96, 96)])
def test_neighbours_in_a_shard_meet_less_often_than_by_chance(batch: int, streams: int) -> None:
    total, per_shard = 40_000, 500
    order = GlobalOrder([[per_shard] * (total // per_shard)], batch, 0, streams, shuffle_buffer=8192)
    batch_of = np.empty(total, int)
    for stream in range(streams):
        for number, (_, shard, offset) in enumerate(stream_samples(order, stream, 0, total // streams)):
            batch_of[shard * per_shard + offset] = number // order.slots_per_stream
    same = (np.diff(batch_of) == 0).reshape(-1)
    inside = np.arange(1, total) % per_shard != 0
    assert same[inside].mean() < (batch - 1) / (total - 1)


def test_far_samples_meet_as_often_as_by_chance() -> None:
    """The order is no fixed partition: two samples of different shards share a batch as chance has it."""
    order = [GlobalOrder([[50] * 40], 100, seed, streams=10, shuffle_buffer=1000) for seed in range(12)]
    together = []
    for one in order:
        batch_of = {}
        for stream in range(10):
            for number, (_, shard, offset) in enumerate(stream_samples(one, stream, 0, 200)):
                batch_of[shard, offset] = number // one.slots_per_stream
        together.append(np.mean([batch_of[a, o] == batch_of[a + 20, o] for a in range(20) for o in range(50)]))
    # 12,000 pairs at chance 99 / 1999 = 0.0495: a deviation of 0.002
    assert abs(np.mean(together) - 99 / 1999) < 0.01


@given(st.lists(st.sampled_from([0.1, 0.25, 1, 2, 3.5, 7]), min_size=1, max_size=5), st.integers(0, 6))
@settings(max_examples=80, deadline=None)
def test_weights_are_kept_exactly(weights: list[float], stream: int) -> None:
    cycle = Cycle(weights)
    turn = cycle.turn(stream, 7)
    served = Counter(turn.set_at(position) for position in range(3 * cycle.length))
    for number, weight in enumerate(weights):
        assert served[number] == pytest.approx(3 * cycle.length * weight / sum(weights), abs=1e-9)
        assert turn.served_before(3 * cycle.length, number) == served[number]
        # at no moment far from its share
        done = np.cumsum([turn.set_at(p) == number for p in range(cycle.length)])
        wish = np.arange(1, cycle.length + 1) * weight / sum(weights)
        assert np.abs(done - wish).max() <= len(weights)
        first = turn.positions(number, 0, 5)
        assert [turn.served_before(int(p), number) for p in first] == [0, 1, 2, 3, 4]


def test_each_batch_holds_the_sets_by_their_weights() -> None:
    order = GlobalOrder([[1000] * 3, [70]], 40, 0, streams=8, shuffle_buffer=320, weights=[3, 1])
    for step in range(30):
        taken = Counter(
            shard
            for stream in range(8)
            for _, shard, _ in mixed(order, stream, step * order.slots_per_stream, order.slots_per_stream)
        )
        assert taken[3] == pytest.approx(10, abs=2)


def test_substitutes_are_of_the_same_set_and_of_few_shards() -> None:
    order = GlobalOrder([[300] * 4, [500] * 6], 8, 0, weights=[1, 1])
    places = [order.substitute(Place(0, 7, 3), 2, position, 0) for position in range(SUBSTITUTES)]
    assert len({place.shard for place in places}) == 1
    assert all(4 <= place.shard < 10 and 0 <= place.offset < SUBSTITUTES for place in places)
    tries = {order.substitute(Place(0, 0, 3), 2, 5, n * TRIES_IN_A_SHARD).shard for n in range(40)}
    assert tries == {0, 1, 2, 3}


def test_a_hundred_million_samples() -> None:
    """10,000 shards of 10,000: where a step stands is known in less than a second."""
    start = time.perf_counter()
    order = GlobalOrder([[10_000] * 10_000], 4096, 0)
    for stream in range(order.streams):
        block = next(order.blocks(stream, 0, 150_000 * order.slots_per_stream))
        assert block.places[0].epoch == 150_000 * 4096 // 100_000_000
    assert time.perf_counter() - start < 1


def test_a_weight_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        Cycle([1, *[1000.0] * 25])


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        GlobalOrder([[0, 0]], 4, 0)
