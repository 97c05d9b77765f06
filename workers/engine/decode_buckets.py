"""Sizes of decode batches: few of them, so that each can be captured once and replayed for every smaller batch."""

from bisect import bisect_left
from collections.abc import Sequence

_STEP = 8


def decode_buckets(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, then multiples of 8 up to 64 and of 32 above; the last holds `max_rows`.

    The steps are narrow where a padded row is a large share of the batch, and wide where each size more would cost
    memory and a capture for little.
    """
    sizes = [size for size in (1, 2, 4, *range(_STEP, 64, _STEP)) if size < max_rows]
    sizes += range(64, max_rows, 32)
    return (*sizes, max_rows)


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds so many rows."""
    index = bisect_left(buckets, num_rows)
    if num_rows < 1 or index == len(buckets):
        raise ValueError(f"{num_rows} rows do not fit the buckets {list(buckets)}")
    return buckets[index]
