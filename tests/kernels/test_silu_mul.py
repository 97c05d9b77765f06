"""The gated unit against torch, over the range where exp over- and underflows."""

import pytest
import torch

from kernels.silu_mul import reference, silu_mul, silu_mul_call
from kernels.team import Step


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (3, 24), (20, 100)])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_agrees_with_torch(num_tokens: int, width: int, scale: float) -> None:
    gate_up = scale * torch.randn(num_tokens, 2 * width)
    torch.testing.assert_close(silu_mul(gate_up), reference(gate_up), atol=1e-6, rtol=2e-6)


def test_an_output_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="must have 8 channels for 4 outputs, got 10"):
        silu_mul_call(Step(), torch.zeros(1, 10), out_TI=torch.zeros(1, 4))
