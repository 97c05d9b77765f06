"""Rows of experts against one product for each: ragged, empty, one row, more than a tile, odd sizes."""

import torch
from hopper import Shipped
from inputs import DEVICE, FLOATS, assert_close, randn, shape_only

from kernels.gpu.grouped_matmul import grouped_matmul, reference


def _assert_agrees(
    counts: list[int], *, num_outputs: int, num_inputs: int, dtype: torch.dtype = FLOATS[0]
) -> None:
    num_rows, num_tokens = sum(counts), 7
    x, weight = (
        randn(num_tokens, num_inputs, dtype=dtype),
        randn(len(counts), num_outputs, num_inputs, dtype=dtype),
    )
    sources = torch.arange(num_rows, device=DEVICE) * 5 % num_tokens
    where = {"sources_S": sources, "starts": torch.tensor([0, *counts], device=DEVICE).cumsum(0)}
    got, expected = grouped_matmul(x, weight, **where), reference(x, weight, **where)
    assert got.dtype == dtype
    assert_close(
        got, expected, tolerance={torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}[dtype]
    )


def check_agrees_with_the_reference_for_any_number_of_rows() -> None:
    for counts in ([1], [0, 3, 0], [16, 1, 17, 0, 40], [0, 0, 0, 2]):
        for dtype in FLOATS:
            _assert_agrees(counts, num_outputs=24, num_inputs=80, dtype=dtype)


def check_agrees_with_the_reference_for_sizes_that_are_no_multiple_of_a_tile() -> None:
    for num_outputs, num_inputs in [(1, 64), (130, 65), (200, 128)]:
        _assert_agrees([5, 0, 20], num_outputs=num_outputs, num_inputs=num_inputs)


def check_large_tiles_agree_with_the_reference() -> None:
    _assert_agrees([150, 0], num_outputs=32, num_inputs=64)
    _assert_agrees([3, 300], num_outputs=32, num_inputs=64)


def check_no_rows_are_no_launch() -> None:
    _assert_agrees([0, 0], num_outputs=8, num_inputs=16)


def _launch(num_rows: int) -> object:
    num_experts, num_outputs, num_inputs = 8, 28_672, 4096
    return grouped_matmul(
        shape_only(2048, num_inputs, dtype=torch.bfloat16),
        shape_only(num_experts, num_outputs, num_inputs, dtype=torch.bfloat16),
        sources_S=shape_only(num_rows, dtype=torch.int64),
        starts=shape_only(num_experts + 1, dtype=torch.int64),
    )


SHIPPED = [
    Shipped(name=f"{num_rows}_rows", launch=lambda num_rows=num_rows: _launch(num_rows), units=("wgmma",))
    for num_rows in (16, 256, 512, 4096)
]
