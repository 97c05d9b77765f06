"""The gate against its formula."""

import torch
from hopper import Shipped
from inputs import TOLERANCE, assert_close, randn, shape_only

from kernels.gpu.silu_mul import reference, silu_mul


def check_agrees_with_the_reference() -> None:
    for num_tokens, width in [(1, 1), (3, 100), (2, 1025), (1, 4096)]:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            gate_up = 4 * randn(num_tokens, 2 * width, dtype=dtype)
            assert_close(silu_mul(gate_up), reference(gate_up), tolerance=TOLERANCE[dtype])


def check_very_negative_gates_give_zero() -> None:
    gate_up = randn(1, 64)
    gate_up[:, :32] = -80.0
    assert_close(silu_mul(gate_up), torch.zeros_like(gate_up[:, :32]), tolerance=1e-6)


def check_no_rows_are_no_launch() -> None:
    assert silu_mul(randn(0, 16)).shape == (0, 8)


SHIPPED = [
    Shipped(name="bf16", units=(None,), launch=lambda: silu_mul(shape_only(64, 28_672, dtype=torch.bfloat16)))
]
