import numpy as np
import pytest
from numba import njit

from kvstore.codec.byte_tiles import turn_


@njit
def _turned(rows_CT: np.ndarray, turned_TC: np.ndarray, num_tokens: int) -> None:
    turn_(rows_CT, turned_TC, num_tokens)


@pytest.mark.parametrize("num_channels", [1, 16, 40, 64])
@pytest.mark.parametrize("num_tokens", [1, 16, 26, 230])
def test_a_token_has_the_bytes_of_its_channels(num_channels: int, num_tokens: int) -> None:
    room = -(-num_tokens // 32) * 32
    rows_CT = np.random.default_rng(0).integers(0, 256, (num_channels, room), np.uint8)
    turned_TC = np.zeros((room, num_channels), np.uint8)
    _turned(rows_CT, turned_TC, num_tokens)
    np.testing.assert_array_equal(turned_TC[:num_tokens], rows_CT[:, :num_tokens].T)
