"""Products of few rows, against torch, for shapes that fill tiles and shapes that do not."""

import pytest
import torch

from kernels.linear import linear, linear_call, reference
from kernels.panels import Panels
from kernels.team import Program, Step


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 7, 32, 64, 65, 130])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"), [(1, 1), (8, 3), (40, 81), (64, 64), (100, 130), (192, 7), (600, 70)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_torch(num_rows: int, num_inputs: int, num_outputs: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x, w = (torch.randn(n, num_inputs, generator=generator) for n in (num_rows, num_outputs))
    bias = torch.randn(num_outputs, generator=generator) if with_bias else None
    torch.testing.assert_close(linear(x, Panels.of(w), bias), reference(x, w, bias), atol=1e-4, rtol=1e-5)


def test_writes_into_the_given_output_and_nothing_else() -> None:
    x, w, memory = torch.randn(3, 20), torch.randn(9, 20), torch.full((5, 9), 7.0)
    step = Step()
    step.fill(3)
    Program([linear_call(step, x, Panels.of(w), None, out_MN=memory[1:4])]).run()
    torch.testing.assert_close(memory[1:4], reference(x, w))
    assert (memory[[0, 4]] == 7.0).all()


def test_several_threads_compute_the_same() -> None:
    x, w = torch.randn(6, 70), Panels.of(torch.randn(500, 70))
    alone = linear(x, w)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(x, w), alone)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(7, 3), (64, 64), (100, 130), (600, 70)])
def test_a_row_comes_out_the_same_to_the_last_bit_beside_any_others(
    num_inputs: int, num_outputs: int
) -> None:
    x, w = torch.randn(130, num_inputs), Panels.of(torch.randn(num_outputs, num_inputs))
    together = linear(x, w)
    for first, count in ((0, 1), (129, 1), (3, 2), (40, 3), (60, 5), (1, 64)):
        assert torch.equal(linear(x[first : first + count], w), together[first : first + count])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        linear(torch.randn(2, 5), Panels.of(torch.randn(3, 6)))
