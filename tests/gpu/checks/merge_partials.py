"""Merging against one softmax over everything."""

import torch
from hopper import Shipped
from inputs import DEVICE, assert_close, randn, shape_only

from kernels.gpu.merge_partials import merge_partials, reference


def check_agrees_with_the_reference_for_any_number_of_sets() -> None:
    for num_partials, num_tokens, num_heads, head_dim in [
        (1, 1, 1, 16),
        (2, 3, 2, 24),
        (16, 1, 2, 8),
        (17, 2, 1, 64),
    ]:
        parts = randn(num_partials, num_tokens, num_heads, head_dim)
        lses = 20 * randn(num_partials, num_tokens, num_heads)
        for got, expected in zip(
            merge_partials(parts, lses, dtype=torch.float32), reference(parts, lses), strict=True
        ):
            assert_close(got, expected, tolerance=1e-5)


def check_an_empty_set_adds_nothing_whatever_its_out_is() -> None:
    parts, lses = randn(3, 2, 2, 16), randn(3, 2, 2)
    parts[1], lses[1] = torch.nan, -torch.inf
    out, lse = merge_partials(parts, lses, dtype=torch.float32)
    expected_out, expected_lse = reference(parts[[0, 2]], lses[[0, 2]])
    assert_close(out, expected_out, tolerance=1e-5)
    assert_close(lse, expected_lse, tolerance=1e-5)


def check_nothing_but_empty_sets_give_zero_and_minus_infinity() -> None:
    parts = torch.full((2, 1, 3, 16), torch.nan, device=DEVICE)
    out, lse = merge_partials(parts, torch.full((2, 1, 3), -torch.inf, device=DEVICE), dtype=torch.float16)
    assert not out.any()
    assert (lse == -torch.inf).all()


def check_no_tokens_are_no_launch() -> None:
    out, lse = merge_partials(randn(2, 0, 4, 16), randn(2, 0, 4), dtype=torch.float32)
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


SHIPPED = [
    Shipped(
        name=f"head_dim_{head_dim}",
        units=(None,),
        launch=lambda head_dim=head_dim: merge_partials(
            shape_only(8, 16, 32, head_dim, dtype=torch.float32),
            shape_only(8, 16, 32, dtype=torch.float32),
            dtype=torch.bfloat16,
        ),
    )
    for head_dim in (64, 128)
]
