"""Values that are no numbers are found, wherever they are."""

import numpy as np
import pytest

from kvstore.codec.finite import is_finite
from tests.kvstore.codec.coding import layout_of

FLOATS = np.array([0.0, -0.0, 1.5, -3e38, 1e-45], np.float32)


def as_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    words = values.view(np.uint32)
    return words.view(np.uint8) if dtype == "float32" else (words >> 16).astype(np.uint16).view(np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_finite(dtype: str) -> None:
    assert is_finite(as_bytes(FLOATS, dtype), layout=layout_of(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_is_found(dtype: str, place: int, number: float) -> None:
    values = FLOATS.copy()
    values[place] = number
    assert not is_finite(as_bytes(values, dtype), layout=layout_of(dtype))


def scaled_blocks(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two blocks of three layers, and views of their numbers and scales."""
    layout = layout_of(dtype)
    data = np.zeros((6, layout.layer_block_bytes), np.uint8)
    numbers = data[:, : layout.layer_numbers_bytes]
    numbers[:] = np.random.default_rng(0).integers(0, 127, numbers.shape)
    return data, numbers, data[:, layout.layer_numbers_bytes :].view(np.float32)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_one_scale_that_is_no_number_is_found(dtype: str, scale: float) -> None:
    data, _, scales = scaled_blocks(dtype)
    assert is_finite(data.reshape(-1), layout=layout_of(dtype))
    scales[3, -1] = scale
    assert not is_finite(data.reshape(-1), layout=layout_of(dtype))


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_of_two_numbers_of_8_bits_fp8_has_no_value_for_these(byte: int) -> None:
    for dtype, is_number in (("int8", True), ("fp8", False)):
        data, numbers, _ = scaled_blocks(dtype)
        numbers[5, -1] = byte
        assert is_finite(data.reshape(-1), layout=layout_of(dtype)) is is_number
