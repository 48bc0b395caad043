import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.order import MixtureOrder, Permutation, mix

SEEDS = st.integers(0, 2**64 - 1)


@given(n=st.integers(1, 3000), key=SEEDS)
def test_a_permutation_is_a_bijection(n, key):
    permutation = Permutation(n, key)
    assert sorted(permutation(i) for i in range(n)) == list(range(n))


@given(n=st.integers(10**6, 10**12), key=SEEDS, i=st.integers(0, 10**6 - 1))
def test_a_large_permutation_stays_in_its_range(n, key, i):
    assert 0 <= Permutation(n, key)(i) < n


def test_a_permutation_looks_shuffled():
    """Displacements and neighbours of a random permutation: mean |p(i)-i| = n/3, few p(i+1) = p(i)+1."""
    n = 5000
    for key in range(5):
        permutation = Permutation(n, mix(key))
        image = [permutation(i) for i in range(n)]
        displacement = sum(abs(p - i) for i, p in enumerate(image)) / n
        assert abs(displacement / (n / 3) - 1) < 0.05
        assert sum(b - a == 1 for a, b in itertools.pairwise(image)) < 12  # expected 1


def test_small_permutations_are_equally_likely():
    counts = Counter(tuple(Permutation(4, mix(9, key))(i) for i in range(4)) for key in range(24 * 200))
    assert len(counts) == 24
    assert min(counts.values()) > 120 and max(counts.values()) < 300  # 200 expected


@given(
    seed=SEEDS,
    parts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=4),
    first=st.integers(0, 10**9),
)
def test_each_block_has_exactly_the_weights(seed, parts, first):
    order = MixtureOrder(seed, [size for size, _ in parts], [weight for _, weight in parts])
    begin = first * order.block
    drawn = Counter(order(i).source for i in range(begin, begin + order.block))
    assert [drawn[source] for source in range(len(parts))] == list(order.weights)


@given(seed=SEEDS, sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_each_epoch_has_every_sample_once(seed, sizes):
    order = MixtureOrder(seed, sizes, range(1, len(sizes) + 1))
    seen = Counter()
    for position in range(order.block * 2 * max(sizes)):
        draw = order(position)
        seen[draw.source, draw.epoch, draw.index] += 1
    assert set(seen.values()) == {1}
    for source, size in enumerate(sizes):
        assert {index for s, epoch, index in seen if (s, epoch) == (source, 0)} == set(range(size))


@given(seed=SEEDS, position=st.integers(0, 10**15))
def test_the_order_is_a_pure_function(seed, position):
    one, other = (MixtureOrder(seed, [10**9, 7], [5, 2]) for _ in range(2))
    other(position // 2)  # what was asked before does not matter
    assert one(position) == other(position)


def test_seeds_and_epochs_give_other_orders():
    order = MixtureOrder(1, [100], [1])
    epochs = [[order(100 * epoch + i).index for i in range(100)] for epoch in range(3)]
    other = [MixtureOrder(2, [100], [1])(i).index for i in range(100)]
    assert len({tuple(indices) for indices in [*epochs, other]}) == 4


def test_redraws_differ_and_stay_in_the_source():
    order = MixtureOrder(1, [50, 1000], [1, 1])
    draw = order(3)
    redraws = [order.redraw(draw, attempt) for attempt in range(1, 20)]
    assert len(set(redraws)) > 10 and max(redraws) < order.sizes[draw.source]


@pytest.mark.parametrize("sizes, weights", [([], []), ([0], [1]), ([3], [0]), ([3, 4], [1]), ([3], [10**7])])
def test_impossible_mixtures_are_refused(sizes, weights):
    if weights == [10**7]:
        sizes, weights = [3, 3], [10**7, 1]
    with pytest.raises(ValueError, match="weight"):
        MixtureOrder(0, sizes, weights)


def test_indices_outside_are_refused():
    with pytest.raises(IndexError, match="outside"):
        Permutation(5, 0)(5)
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, 0)
