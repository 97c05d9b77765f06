"""Rows as 8-bit integers: against plain torch, and what must not become a number."""

import pytest
import torch

from kernels.int8_rows import quantize_rows, reference


@pytest.mark.parametrize(("num_rows", "depth"), [(0, 8), (1, 1), (3, 7), (20, 64), (9, 1027)])
def test_agrees_with_the_reference_to_the_last_bit(num_rows: int, depth: int) -> None:
    x = torch.randn(num_rows, depth, generator=torch.Generator().manual_seed(depth))
    rows = quantize_rows(x)
    q, scale, offset = reference(x)
    assert torch.equal(rows.q_MP, q)
    assert torch.equal(rows.scale_M, scale)
    assert torch.equal(rows.offset_M, offset)


def test_no_item_is_off_by_more_than_half_a_step() -> None:
    x = torch.randn(50, 33) * torch.logspace(-30, 30, 50)[:, None]
    rows = quantize_rows(x)
    steps = x.double() / rows.scale_M.double()[:, None]
    assert (steps - rows.q_MP[:, :33]).abs().max() <= 0.5 + 1e-4
    assert rows.q_MP.abs().amax(-1).tolist() == [127] * 50


def test_ties_go_to_the_even_neighbour() -> None:
    rows = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5]]))
    assert rows.q_MP[0, :5].tolist() == [127, 0, 2, 0, -2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_no_number_has_a_scale_that_is_none(value: float) -> None:
    x = torch.ones(3, 70)
    x[1, 69] = value
    assert quantize_rows(x).scale_M.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40])
def test_rows_of_next_to_nothing_are_zero(size: float) -> None:
    rows = quantize_rows(torch.full((2, 9), size))
    assert rows.scale_M.isfinite().all()
    assert not rows.q_MP.any()


def test_the_largest_floats_have_a_finite_scale() -> None:
    top = torch.finfo(torch.float32).max
    rows = quantize_rows(torch.tensor([[top, -top, 0.0]]))
    assert rows.q_MP[0].tolist() == [127, -127, 0, 0]
    assert rows.scale_M.item() == pytest.approx(top / 127)
