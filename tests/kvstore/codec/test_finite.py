"""Values that are no numbers are found, wherever they are."""

import numpy as np
import pytest

from kvstore.codec.finite import is_finite

FLOATS = np.array([0.0, -0.0, 1.5, -3e38, 1e-45], np.float32)


def as_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    words = values.view(np.uint32)
    return words.view(np.uint8) if dtype == "float32" else (words >> 16).astype(np.uint16).view(np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_finite(dtype: str) -> None:
    assert is_finite(as_bytes(FLOATS, dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_is_found(dtype: str, place: int, number: float) -> None:
    values = FLOATS.copy()
    values[place] = number
    assert not is_finite(as_bytes(values, dtype), dtype=dtype)
