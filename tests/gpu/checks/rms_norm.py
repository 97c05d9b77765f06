"""The norm against its formula, alone and after the residual addition."""

import torch
from hopper import Shipped
from inputs import TOLERANCE, assert_close, assert_equal_but_for_rounding, randn, shape_only

from kernels.gpu.rms_norm import add_rms_norm_, reference, rms_norm

SHAPES = [(1, 1), (1, 48), (5, 100), (3, 4096)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_agrees_with_the_reference() -> None:
    for num_tokens, width in SHAPES:
        for dtype in DTYPES:
            x, weight = randn(num_tokens, width, dtype=dtype), randn(width, dtype=dtype)
            assert_close(
                rms_norm(x, weight, eps=1e-5), reference(x, weight, eps=1e-5), tolerance=TOLERANCE[dtype]
            )


def check_adds_to_the_residual_in_place_before_the_norm() -> None:
    for dtype in DTYPES:
        residual, delta, weight = (
            randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(4, 48), (4, 48), (48,)])
        )
        total = residual + delta
        normed = add_rms_norm_(residual, delta, weight, eps=1e-6)
        assert_equal_but_for_rounding(residual, total)
        assert_close(normed, reference(total, weight, eps=1e-6), tolerance=TOLERANCE[dtype])


def check_rows_may_be_apart_and_what_lies_between_stays() -> None:
    wide, delta, weight = randn(3, 64), randn(3, 24, seed=1), randn(24)
    before = wide.clone()
    total = before[:, :24] + delta
    normed = add_rms_norm_(wide[:, :24], delta, weight, eps=1e-6)
    assert_close(normed, reference(total, weight, eps=1e-6), tolerance=1e-5)
    assert torch.equal(wide[:, 24:], before[:, 24:])


def check_zeros_stay_zeros_and_no_rows_are_no_launch() -> None:
    assert not rms_norm(torch.zeros_like(randn(2, 16)), randn(16), eps=1e-6).any()
    assert rms_norm(randn(0, 16), randn(16), eps=1e-6).shape == (0, 16)


SHIPPED = [
    Shipped(
        name=f"width_{width}",
        units=(None,),
        launch=lambda width=width: add_rms_norm_(
            *(shape_only(64, width, dtype=torch.bfloat16) for _ in range(2)),
            shape_only(width, dtype=torch.bfloat16),
            eps=1e-6,
        ),
    )
    for width in (4096, 8192)
]
