"""Programs: order, reuse with new sizes, and what cannot be bound."""

import pytest
import torch

from kernels.linear import linear_call
from kernels.panels import Panels
from kernels.silu_mul import silu_mul_call
from kernels.team import Program, Step, bind


def test_calls_see_what_the_calls_before_them_wrote() -> None:
    x, w = torch.randn(4, 12), torch.randn(20, 12)
    gate_up, act = torch.empty(4, 20), torch.empty(4, 10)
    step = Step()
    program = Program(
        [linear_call(step, x, Panels.of(w), None, out_MN=gate_up), silu_mul_call(step, gate_up, out_TI=act)]
    )
    step.fill(4)
    program.run()
    gate, up = (x @ w.T).chunk(2, dim=1)
    torch.testing.assert_close(act, torch.nn.functional.silu(gate) * up)


def test_a_program_runs_again_with_as_many_tokens_as_its_step_says() -> None:
    x, w, y = torch.randn(6, 8), torch.randn(5, 8), torch.zeros(6, 5)
    step = Step()
    program = Program([linear_call(step, x, Panels.of(w), None, out_MN=y)])
    for num_tokens in (2, 6, 0):
        y.zero_()
        step.fill(num_tokens)
        program.run()
        torch.testing.assert_close(y[:num_tokens], (x @ w.T)[:num_tokens])
        assert not y[num_tokens:].any()


def test_part_of_a_program_can_run() -> None:
    x, w, y = torch.randn(1, 8), torch.randn(5, 8), torch.zeros(2, 5)
    step = Step()
    step.fill(1)
    program = Program([linear_call(step, x, Panels.of(w), None, out_MN=y[row : row + 1]) for row in range(2)])
    program.run(1, 2)
    assert not y[0].any()
    assert y[1].all()
    assert len(program) == 2


@pytest.mark.parametrize("tensor", [torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4).T[:2]])
def test_memory_that_kernels_cannot_read_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="rows of float32 or integers"):
        bind(0, Step(), tensor)
