"""Length buckets: compute a batch in a few parts of similar length, so that short prompts get less padding.

Results are the same if nothing depends on padding: the MLLM is causal and padded on the right, and M masks padding.
Only dropout draws different numbers.
"""

from collections.abc import Sequence


def length_buckets(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Divide the rows into `count` buckets of nearly equal size, shortest first; at most one bucket per row.

    The number of buckets depends on the number of rows alone, because sharded ranks must all have the same.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    count = min(count, len(order))
    ends = [len(order) * (bucket + 1) // count for bucket in range(count)]
    return [order[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
