"""A row of scores against the formula, for lengths that fill vectors and lengths that do not."""

import numpy as np
import pytest
import torch
from numba import njit

from kernels.softmax_row import reference, softmax_row


@njit
def weigh(scores, scale, totals):  # type: ignore[no-untyped-def]
    softmax_row(scores.ctypes.data, len(scores), scale, totals.ctypes.data)


@pytest.mark.parametrize("num_scores", [1, 2, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_agrees_with_the_reference(num_scores: int, spread: float) -> None:
    scores = spread * np.random.default_rng(num_scores).standard_normal(num_scores).astype(np.float32)
    weights, top, total = reference(torch.from_numpy(scores.copy()), 0.5)
    totals = np.empty(2, dtype=np.float32)
    weigh(scores, np.float32(0.5), totals)
    assert totals[0] == top
    torch.testing.assert_close(torch.from_numpy(scores), weights)
    torch.testing.assert_close(torch.tensor(totals[1]), total)
