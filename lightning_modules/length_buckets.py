"""One batch computed in a few parts of similar length, so that short prompts are not padded to the longest.

Exact where nothing reads padding: the MLLM is causal and pads on the right, M masks padding. Under dropout the draws
are others.
"""

from collections.abc import Sequence


def length_buckets(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Rows in `count` buckets of nearly equal size, shortest first; never more buckets than rows.

    The number of buckets depends on the number of rows alone, as ranks that compute together must agree on it.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    count = min(count, len(order))
    ends = [len(order) * (bucket + 1) // count for bucket in range(count)]
    return [order[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
