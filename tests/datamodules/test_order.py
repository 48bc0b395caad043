"""The order: a pure function, every sample once an epoch, exact weights, lanes that keep to their shards."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.order import Mixture, SampleOrder, integer_weights, mix, shuffled

SEEDS = st.integers(0, 2**64 - 1)
examples = settings(max_examples=50, deadline=None)


@examples
@given(n=st.integers(0, 3000), key=SEEDS)
def test_a_shuffle_is_a_bijection(n, key):
    assert sorted(shuffled(n, key)) == list(range(n))


def test_a_shuffle_is_the_same_everywhere():
    assert shuffled(8, 1, 2).tolist() == [2, 7, 3, 1, 5, 6, 0, 4]
    assert mix(1, 2) == 13608149317741381227


def test_shuffles_look_random():
    """Displacements and neighbours of a random permutation: mean |p(i)-i| = n/3, few p(i+1) = p(i)+1."""
    n = 5000
    found = shuffled(n, 3).tolist()
    assert abs(sum(abs(p - i) for i, p in enumerate(found)) / n / (n / 3) - 1) < 0.05
    assert sum(b - a == 1 for a, b in itertools.pairwise(found)) < 12  # expected 1
    counts = Counter(tuple(shuffled(4, 9, key).tolist()) for key in range(24 * 100))
    assert len(counts) == 24 and min(counts.values()) > 50 and max(counts.values()) < 170  # 100 expected


def resolved(order: SampleOrder, lane: int, number: int) -> tuple[int, int]:
    """Shard and number in it of a lane's sample."""
    block, place = order(lane, number)
    place = int(shuffled(len(block), *block.key)[place])
    for part in block.slices:
        if place < part.end - part.begin:
            return part.shard, part.begin + place
        place -= part.end - part.begin
    raise AssertionError


@examples
@given(
    seed=SEEDS,
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any),
    lanes=st.integers(1, 6),
    window=st.integers(1, 6),
    block=st.integers(1, 50),
)
def test_each_epoch_has_every_sample_once(seed, counts, lanes, window, block):
    order = SampleOrder(np.array(counts), seed, lanes, 3, window, block)
    total = sum(counts)
    for epoch in range(2):
        if order.one_block:  # then the lanes deal out one sequence
            mixture = Mixture(seed, [1], lanes, 3)
            draws = [mixture(position) for position in range(epoch * total, (epoch + 1) * total)]
            seen = Counter(resolved(order, draw.lane, draw.row) for draw in draws)
        else:
            sizes = [(lane + 1) * total // lanes - lane * total // lanes for lane in range(lanes)]
            seen = Counter(
                resolved(order, lane, number)
                for lane, size in enumerate(sizes)
                for number in range(epoch * size, (epoch + 1) * size)
            )
        assert len(seen) == total and set(seen.values()) == {1}


@examples
@given(seed=SEEDS, lane=st.integers(0, 7), number=st.integers(0, 10**12))
def test_the_order_is_a_pure_function(seed, lane, number):
    counts = np.array([100, 7, 2000] * 10)
    one, other = (SampleOrder(counts, seed, 8, 16, 4, 50) for _ in range(2))
    other(lane, number // 2)  # what was asked before does not matter
    assert one(lane, number) == other(lane, number)
    first, second = (Mixture(seed, [5, 2], 8, 16) for _ in range(2))
    second(number // 2)
    assert first(number) == second(number)


def test_a_lane_reads_its_shards_in_sequence():
    """Windows of four shards one after the other, each block an equal slice of each shard; none is met again."""
    order = SampleOrder(np.full(64, 100), 3, 4, 16, 4, 80)
    first, second = ([order(lane, begin)[0].window for lane in range(4)] for begin in (0, 1600))
    assert first != second, "each epoch has an order of shards"
    for lane in range(4):
        blocks = [block for block, _ in itertools.groupby(order(lane, number)[0] for number in range(1600))]
        windows = [window for window, _ in itertools.groupby(block.window for block in blocks)]
        assert len(windows) == 4 and len({shard for window in windows for shard in window}) == 16
        assert all(len(block) == 80 and len(block.slices) == 4 for block in blocks)
        for before, after in itertools.pairwise(blocks):
            if before.window == after.window:
                assert [part.end for part in before.slices] == [part.begin for part in after.slices]
            else:
                assert before.following == after.window


def test_seeds_and_epochs_give_other_orders():
    for window in (8, 2):  # a full shuffle, and windows
        counts = np.full(8, 25)
        orders = [SampleOrder(counts, seed, 1, 1, window, 20) for seed in (1, 2)]
        epochs = [[resolved(orders[0], 0, 200 * epoch + i) for i in range(200)] for epoch in range(3)]
        other = [resolved(orders[1], 0, i) for i in range(200)]
        assert len({tuple(found) for found in [*epochs, other]}) == 4


def test_a_batch_draws_on_many_shards():
    """16 rows of one lane, window 8, block 4,096: 7.1 of 8 shards expected of random draws."""
    order = SampleOrder(np.full(200_000, 10_000), 0, 8, 16, 8, 4096)
    drawn = [len({resolved(order, 3, 16 * batch + row)[0] for row in range(16)}) for batch in range(1000, 1020)]
    assert abs(sum(drawn) / len(drawn) - 8 * (1 - (7 / 8) ** 16)) < 0.4


@examples
@given(
    seed=SEEDS,
    weights=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    lanes=st.integers(1, 5),
    lane_rows=st.integers(1, 9),
    first=st.integers(0, 10**9),
)
def test_each_block_of_a_lane_has_exactly_the_weights(seed, weights, lanes, lane_rows, first):
    mixture = Mixture(seed, weights, lanes, lane_rows)
    block = sum(mixture.weights)
    # Rows of a whole number of blocks in every lane.
    begin, rows = first * block * lanes * lane_rows, block * lanes * lane_rows
    drawn = Counter()
    for position in range(begin, begin + rows):
        draw = mixture(position)
        drawn[draw.lane, draw.source] += 1
    expected = {(lane, s): lane_rows * w for lane in range(lanes) for s, w in enumerate(mixture.weights)}
    assert drawn == expected


@examples
@given(seed=SEEDS, lanes=st.integers(1, 4), turn=st.integers(1, 4))
def test_every_row_of_a_source_is_asked_for_once(seed, lanes, turn):
    mixture = Mixture(seed, [3, 1, 2], lanes, 2 * turn, turn, repeats=2)
    draws = [mixture(position) for position in range(6 * 2 * 2 * turn * lanes * 3)]
    assert len(set(draws)) == len(draws)
    rows = Counter((draw.source, draw.lane) for draw in draws)
    assert all({d.row for d in draws if (d.source, d.lane) == key} == set(range(n)) for key, n in rows.items())


def test_impossible_mixtures_and_orders_are_refused():
    for weights in [[], [0, 1], [-1], [10**7, 1]]:
        with pytest.raises(ValueError, match="weight"):
            Mixture(0, weights, 1, 1)
    for counts, lanes in (([], 1), ([0, 0], 1), ([3], 0)):
        with pytest.raises(ValueError, match="at least 1"):
            SampleOrder(np.array(counts, dtype=np.int64), 0, lanes, 1, 1, 1)


def test_shares_become_whole_weights():
    assert integer_weights([2.0, 2.0, 1.0]) == [400, 400, 200]
    assert integer_weights([1e-6, 1.0]) == [1, 1000]
    with pytest.raises(ValueError, match="above 0"):
        integer_weights([1.0, 0.0])
