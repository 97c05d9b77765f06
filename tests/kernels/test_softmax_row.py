"""A row of scores against torch, for lengths that fill vectors and lengths that do not."""

import numpy as np
import pytest
import torch
from numba import njit

from kernels.softmax_row import softmax_row


@njit
def weigh(scores, scale, totals):  # type: ignore[no-untyped-def]
    softmax_row(scores.ctypes.data, len(scores), scale, totals.ctypes.data)


@pytest.mark.parametrize("num_scores", [1, 2, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_agrees_with_torch(num_scores: int, spread: float) -> None:
    scores = spread * np.random.default_rng(num_scores).standard_normal(num_scores).astype(np.float32)
    expected, largest = torch.from_numpy(0.5 * scores).softmax(0), scores.max()
    totals = np.empty(2, dtype=np.float32)
    weigh(scores, np.float32(0.5), totals)
    assert totals[0] == largest
    torch.testing.assert_close(torch.from_numpy(scores / totals[1]), expected)
