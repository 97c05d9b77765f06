"""Whether KV is numbers: an exponent of ones alone is NaN or infinity; of E4M3, NaN has ones alone beside its sign.

So no word without its sign may reach a bound; nor may a scale that would make its largest number infinite.
"""

from typing import Any

import numpy as np
from numba import njit, types

from kvstore.codec.quantize import Bytes
from kvstore.layout import KvLayout

Word = np.uint32 | np.uint16 | np.uint8

_BOUNDS: dict[str, Word] = {
    "float32": np.uint32(0x7F800000),
    "bfloat16": np.uint16(0x7F80),
    "fp8": np.uint8(0x7F),
}  # every int8 is a number
_LARGEST_NUMBERS = {"int8": 127, "fp8": 448}
_SCALE_BOUNDS = {
    dtype: np.nextafter(np.finfo(np.float32).max / np.float32(largest), np.float32(np.inf)).view(np.uint32)
    for dtype, largest in _LARGEST_NUMBERS.items()
}


def is_finite(data: Bytes, *, layout: KvLayout) -> bool:
    """Of contiguous bytes that hold blocks of a layer or of all, one after the other."""
    if not layout.is_scaled:
        return _is_below(data, _BOUNDS[layout.dtype])
    layers = data.reshape(-1, layout.layer_block_bytes)
    numbers, scales = np.split(layers, [layout.layer_numbers_bytes], axis=1)
    are_numbers = layout.dtype not in _BOUNDS or _is_below(numbers, _BOUNDS[layout.dtype])
    return are_numbers and _is_below(scales, _SCALE_BOUNDS[layout.dtype])


def _is_below(data: Bytes, bound: Word) -> bool:
    words = np.ascontiguousarray(data).view(bound.dtype).reshape(-1)
    sign = bound.dtype.type(1 << (8 * bound.itemsize - 1))
    return bool(_largest(words, ~sign) < bound)


@njit(
    [kind(types.Array(kind, 1, "C", readonly=True), kind) for kind in (types.uint32, types.uint16, types.uint8)],
    cache=True, nogil=True,
)  # fmt: skip
def _largest(words: Any, mask: Any) -> Any:
    largest = mask ^ mask
    for word in words:
        largest = max(largest, word & mask)
    return largest
