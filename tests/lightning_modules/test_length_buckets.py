"""Length buckets hold every row once, shortest first, and their number depends on the number of rows alone."""

from itertools import pairwise
from random import Random

from lightning_modules.length_buckets import length_buckets


def test_every_row_once_shortest_first_in_as_many_buckets_as_asked_for() -> None:
    source = Random(0)
    for rows in range(1, 12):
        lengths = [source.choice((3, 9, source.randrange(1, 60))) for _ in range(rows)]
        for count in range(1, 9):
            buckets = length_buckets(lengths, count)
            assert len(buckets) == min(count, rows)  # ranks that compute together count on it
            assert sorted(row for bucket in buckets for row in bucket) == list(range(rows))
            assert max(map(len, buckets)) - min(map(len, buckets)) <= 1
            for shorter, longer in pairwise(buckets):
                assert max(lengths[row] for row in shorter) <= min(lengths[row] for row in longer)
