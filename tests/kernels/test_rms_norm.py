"""The norm against its formula, alone and after the residual addition."""

import pytest
import torch

from kernels.rms_norm import add_rms_norm_, reference, rms_norm


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (1, 48), (5, 100), (40, 192)])
def test_agrees_with_the_reference(num_tokens: int, width: int) -> None:
    x, weight = torch.randn(num_tokens, width), torch.randn(width)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-5), reference(x, weight, eps=1e-5))


def test_adds_to_the_residual_in_place_before_the_norm() -> None:
    residual, delta, weight = torch.randn(4, 48), torch.randn(4, 48), torch.randn(48)
    total = residual + delta
    normed = add_rms_norm_(residual, delta, weight, eps=1e-6)
    assert torch.equal(residual, total)
    torch.testing.assert_close(normed, reference(total, weight, eps=1e-6))


def test_zeros_stay_zeros() -> None:
    assert not rms_norm(torch.zeros(2, 16), torch.ones(16), eps=1e-6).any()


def test_bfloat16_takes_its_sum_in_float32() -> None:
    x, weight = torch.randn(3, 256).bfloat16(), torch.ones(256).bfloat16()
    torch.testing.assert_close(
        rms_norm(x, weight, eps=1e-6).float(),
        reference(x.float(), weight.float(), eps=1e-6),
        atol=2e-2,
        rtol=2e-2,
    )
