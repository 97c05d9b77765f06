"""Whether KV is numbers: an exponent of ones alone is NaN or infinity; of E4M3, NaN has ones alone beside its sign."""

from typing import Any

import numpy as np
from numba import njit, types

from kvstore.codec.quantize import Bytes
from kvstore.layout import KvLayout

_FLOAT32 = np.uint32(0x7F800000)
_ONES: dict[str, np.uint32 | np.uint16 | np.uint8] = {
    "float32": _FLOAT32,
    "bfloat16": np.uint16(0x7F80),
    "fp8": np.uint8(0x7F),
}  # every int8 is a number


def is_finite(data: Bytes, *, layout: KvLayout) -> bool:
    """Of contiguous bytes that hold blocks of a layer or of all, one after the other."""
    if not layout.is_scaled:
        return _has_none(data, _ONES[layout.dtype])
    layers = data.reshape(-1, layout.layer_block_bytes)
    numbers, scales = np.split(layers, [layout.layer_numbers_bytes], axis=1)
    are_numbers = layout.dtype not in _ONES or _has_none(numbers, _ONES[layout.dtype])
    return are_numbers and _has_none(scales, _FLOAT32)


def _has_none(data: Bytes, ones: np.uint32 | np.uint16 | np.uint8) -> bool:
    words = np.ascontiguousarray(data).view(ones.dtype).reshape(-1)
    return bool(_largest(words, ones) < ones)


@njit(
    [kind(types.Array(kind, 1, "C", readonly=True), kind) for kind in (types.uint32, types.uint16, types.uint8)],
    cache=True, nogil=True,
)  # fmt: skip
def _largest(words: Any, ones: Any) -> Any:
    largest = ones ^ ones
    for word in words:
        largest = max(largest, word & ones)
    return largest
