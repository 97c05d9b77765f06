"""Rows and weights of 8 bits against the product of what they stand for."""

import torch
from hopper import Shipped
from inputs import DEVICE, FLOATS, IS_INTERPRETED, assert_close, assert_steps_close, randn, shape_only

from kernels.gpu.fp8_linear import fp8_linear, quantize_rows, reference, reference_quantize
from kernels.gpu.quantized_linear import GROUP, QuantizedWeight


def _weight(num_outputs: int, num_groups: int) -> QuantizedWeight:
    return QuantizedWeight(
        numbers_NK=randn(num_outputs, num_groups * GROUP).to(torch.float8_e4m3fn),
        scales_NJ=randn(num_outputs, num_groups, seed=1).abs(),
        zeros_NJ=None,
    )


def check_rows_get_scales_that_use_the_whole_range() -> None:
    for num_tokens, width in [(1, 1), (3, 100), (2, 4096)]:
        x = 7 * randn(num_tokens, width, dtype=FLOATS[0])
        (got, scales), (expected, expected_scales) = quantize_rows(x), reference_quantize(x)
        assert_close(scales, expected_scales, tolerance=1e-6)
        assert (got.float().abs().amax(-1) == 448).all()
        assert_steps_close(got.float(), expected.float(), dtype=torch.float8_e4m3fn)


def check_agrees_with_the_reference() -> None:
    for num_tokens, num_outputs, num_groups in [(1, 64, 1), (70, 130, 3), (17, 65, 9)]:
        for dtype in FLOATS:
            x, weight = randn(num_tokens, num_groups * GROUP, dtype=dtype), _weight(num_outputs, num_groups)
            got, expected = fp8_linear(x, weight), reference(x, weight)
            assert got.dtype == dtype
            # The interpreter halves some numbers (`assert_steps_close`).
            allowed = 0.2 if IS_INTERPRETED else 1e-2
            assert (got.float() - expected).norm() < allowed * expected.norm()


def check_a_row_of_zeros_gives_zeros_and_no_rows_are_no_launch() -> None:
    weight = _weight(16, 1)
    assert not fp8_linear(torch.zeros(2, GROUP, device=DEVICE), weight).any()
    assert fp8_linear(randn(0, GROUP), weight).shape == (0, 16)


def _launch() -> torch.Tensor:
    weight = QuantizedWeight(
        numbers_NK=shape_only(4096, 14_336, dtype=torch.float8_e4m3fn),
        scales_NJ=shape_only(4096, 14_336 // GROUP, dtype=torch.float32),
        zeros_NJ=None,
    )
    return fp8_linear(shape_only(2048, 14_336, dtype=torch.bfloat16), weight)


SHIPPED = [Shipped(name="2048_tokens", launch=_launch, units=(None, "wgmma"))]
