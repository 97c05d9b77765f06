"""int8 products against exact integer arithmetic, for shapes that fill blocks and tiles and shapes that do not."""

import numpy as np
import pytest
import torch

from kernels.int8_linear import MAX_DEPTH, Int8Weights, int8_linear, reference
from kernels.int8_rows import reference as rows_reference


def packed(w_NK: torch.Tensor) -> Int8Weights:
    weights = Int8Weights(*w_NK.shape)
    weights.put(w_NK)
    return weights


def exact(x_MK: torch.Tensor, w_NK: torch.Tensor) -> np.ndarray:
    """In numpy: integers summed in 64 bits, then scaled in fp32."""
    (x8, x_scale, _), (w8, w_scale, _) = rows_reference(x_MK), rows_reference(w_NK)
    sums = x8.numpy().astype(np.int64) @ w8.numpy().astype(np.int64).T
    return sums.astype(np.float32) * w_scale.numpy() * x_scale.numpy()[:, None]


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 6, 7, 13, 95, 96, 97, 130])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"), [(1, 1), (8, 3), (40, 81), (64, 64), (101, 130), (1027, 200)]
)
def test_agrees_with_exact_arithmetic_to_the_last_bit(
    num_rows: int, num_inputs: int, num_outputs: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x, w = (torch.randn(n, num_inputs, generator=generator) for n in (num_rows, num_outputs))
    bias = torch.randn(num_outputs, generator=generator)
    assert np.array_equal(int8_linear(x, packed(w)).numpy(), exact(x, w))
    assert torch.equal(int8_linear(x, packed(w), bias), reference(x, w, bias))
    assert np.array_equal(reference(x, w).numpy(), exact(x, w))


def test_is_near_to_the_product_that_is_not_quantized() -> None:
    x, w = torch.randn(40, 512), torch.randn(70, 512)
    wanted = x @ w.T
    assert (int8_linear(x, packed(w)) - wanted).norm() < 0.015 * wanted.norm()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_of_the_largest_products_do_not_overflow(sign: float) -> None:
    x, w = torch.full((2, MAX_DEPTH), sign), torch.ones(3, MAX_DEPTH)
    assert np.array_equal(int8_linear(x, packed(w)).numpy(), exact(x, w))
    torch.testing.assert_close(int8_linear(x, packed(w)), x @ w.T, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=f"at most {MAX_DEPTH} inputs, got {MAX_DEPTH + 1}"):
        Int8Weights(1, MAX_DEPTH + 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none_and_stays_in_its_row(value: float) -> None:
    x, w = torch.randn(9, 40), torch.randn(70, 40)
    clean = int8_linear(x, packed(w))
    x[4, 39], w[65, 0] = value, value
    got = int8_linear(x, packed(w))
    assert got[4].isnan().all()
    assert got[:, 65].isnan().all()
    kept = torch.ones_like(got, dtype=torch.bool)
    kept[4], kept[:, 65] = False, False
    assert torch.equal(got[kept], clean[kept])


def test_rows_and_outputs_of_zeros_give_zeros() -> None:
    x, w = torch.randn(5, 24), torch.randn(10, 24)
    x[2], w[7] = 0.0, 0.0
    got = int8_linear(x, packed(w))
    assert not got[2].any()
    assert not got[:, 7].any()


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(7, 3), (64, 64), (101, 130)])
def test_a_row_comes_out_the_same_to_the_last_bit_beside_any_others(
    num_inputs: int, num_outputs: int
) -> None:
    x, weights = torch.randn(130, num_inputs), packed(torch.randn(num_outputs, num_inputs))
    together = int8_linear(x, weights)
    for first, count in ((0, 1), (129, 1), (3, 2), (40, 3), (60, 5), (1, 64)):
        assert torch.equal(int8_linear(x[first : first + count], weights), together[first : first + count])


def test_several_threads_compute_the_same() -> None:
    x, weights = torch.randn(6, 70), packed(torch.randn(1000, 70))
    alone = int8_linear(x, weights)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(int8_linear(x, weights), alone)
    finally:
        torch.set_num_threads(num_threads)


def test_matrices_may_be_put_part_by_part() -> None:
    w, weights = torch.randn(150, 33), Int8Weights(150, 33)
    for start, stop in ((100, 150), (0, 41), (41, 100)):
        weights.put(w[start:stop], start=start)
    whole = packed(w)
    assert torch.equal(weights.packed, whole.packed)
    assert torch.equal(weights.scale_EN, whole.scale_EN)
    for rows, start in ((w, 1), (w[:2], -1), (w[:, :32], 0)):
        with pytest.raises(ValueError, match=r"have no place in \[150, 33\]"):
            weights.put(rows, start=start)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        int8_linear(torch.randn(2, 5), packed(torch.randn(3, 6)))
