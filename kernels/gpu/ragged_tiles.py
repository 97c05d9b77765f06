"""Which rows a program computes, where requests (or experts) of different sizes lie one after the other.

Request r has M rows for each of its entries, starts[r] to starts[r + 1] - 1, and rounds them up to whole tiles of its
own. num_tiles() is enough for any sizes, and a program finds its request by bisection: so a launch needs no number that
only the device knows.
"""

import triton
import triton.language as tl


def num_tiles(num_rows: int, num_requests: int, *, tile_rows: int) -> int:
    """Tiles enough for so many rows, however they are spread over the requests."""
    return num_rows // tile_rows + num_requests


@triton.jit
def first_tile(starts, request, M: tl.constexpr, ROWS: tl.constexpr):
    """Where the tiles of a request begin, if each request rounds its rows up to whole tiles of its own."""
    return tl.load(starts + request).to(tl.int32) * M // ROWS + request


@triton.jit
def request_of(starts, tile, num_requests, M: tl.constexpr, ROWS: tl.constexpr):
    """The last request whose tiles begin at or before `tile`."""
    low, high = 0, num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if first_tile(starts, middle, M, ROWS) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def rows_of(starts, tile, num_requests, ROWS: tl.constexpr):
    """(request of a tile, first row, where its rows stop), of a row for each entry; no rows if they stop before."""
    request = request_of(starts, tile, num_requests, 1, ROWS)
    first = tl.load(starts + request).to(tl.int32) + (tile - first_tile(starts, request, 1, ROWS)) * ROWS
    return request, first, tl.load(starts + request + 1).to(tl.int32)
