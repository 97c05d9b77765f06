"""Rows of 8 bits against the rows that they stand for."""

import torch
from hopper import Shipped
from inputs import DEVICE, FLOATS, assert_close, assert_steps_close, randn, shape_only

from kernels.gpu.fp8_rows import fp8_rows, reference


def check_rows_get_scales_that_use_the_whole_range() -> None:
    for num_tokens, width in [(1, 1), (3, 100), (2, 4096)]:
        x = 7 * randn(num_tokens, width, dtype=FLOATS[0])
        (got, scales), (expected, expected_scales) = fp8_rows(x), reference(x)
        assert_close(scales, expected_scales, tolerance=1e-6)
        assert (got.float().abs().amax(-1) == 448).all()
        assert_steps_close(got.float(), expected.float(), dtype=torch.float8_e4m3fn)


def check_a_row_does_not_depend_on_those_beside_it_nor_on_what_lies_between() -> None:
    wide = 7 * randn(5, 300, dtype=FLOATS[0])
    wide[:, 200:] = torch.nan
    together, scales = fp8_rows(wide[:, :200])
    for t in range(5):
        alone, scale = fp8_rows(wide[t : t + 1, :200])
        assert torch.equal(alone[0].view(torch.uint8), together[t].view(torch.uint8))
        assert scale[0] == scales[t]


def check_a_row_of_zeros_has_scale_0_and_no_rows_are_no_launch() -> None:
    x8, scales = fp8_rows(torch.zeros(2, 50, device=DEVICE))
    assert not x8.float().any()
    assert not scales.any()
    assert fp8_rows(randn(0, 50))[0].shape == (0, 50)


SHIPPED = [
    Shipped(
        name=f"width_{width}",
        launch=lambda width=width: fp8_rows(shape_only(2048, width, dtype=torch.bfloat16)),
        units=(None,),
    )
    for width in (768, 4096, 14_336)
]
