"""exp against double precision over its whole range, and outside of it."""

import numpy as np

from kernels.exponential import exponential


def test_is_accurate_over_its_range() -> None:
    x = np.linspace(-87.0, 88.0, 20_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    got = np.array([exponential(value) for value in x])
    assert (np.abs(got - exact) / exact).max() < 3e-7


def test_clamps_what_float32_cannot_hold() -> None:
    assert exponential(np.float32(-np.inf)) == exponential(np.float32(-87.0)) < 1e-37
    assert np.isfinite(exponential(np.float32(np.inf)))
