"""Whether KV is numbers: a value whose exponent is all ones is NaN or infinity."""

from typing import Any

import numpy as np
from numba import njit

from kvstore.codec.quantize import Bytes

_EXPONENTS: dict[str, np.uint32 | np.uint16] = {
    "float32": np.uint32(0x7F800000),
    "bfloat16": np.uint16(0x7F80),
}


def is_finite(data: Bytes, *, dtype: str) -> bool:
    """Of contiguous bytes that hold values of `dtype`."""
    exponent = _EXPONENTS[dtype]
    return bool(_largest_exponent(data.view(exponent.dtype), exponent) < exponent)


@njit(["uint32(uint32[::1], uint32)", "uint16(uint16[::1], uint16)"], cache=True, nogil=True)
def _largest_exponent(words: Any, exponent: Any) -> Any:
    largest = exponent ^ exponent
    for word in words:
        largest = max(largest, word & exponent)
    return largest
