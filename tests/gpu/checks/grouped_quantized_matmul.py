"""Rows of experts with weights of 8 and 4 bits: ragged, empty, one row, every size of tile, odd sizes, any kind."""

import torch
from hopper import Shipped
from inputs import DEVICE, FLOATS, assert_close, randn, shape_only
from quantized_noise import KINDS, allowed_error, as_multiplied, noise_orders, noise_weight, weight_shape_only

from kernels.gpu.grouped_quantized_matmul import grouped_quantized_matmul, reference
from kernels.gpu.quantized_linear import reference as linear_reference
from kernels.gpu.quantized_weight import GROUP, GROUPS, QuantizedWeight


def _assert_agrees(
    counts: list[int],
    kind: str,
    *,
    num_outputs: int = 24,
    num_groups: int = 2,
    group_size: int = GROUP,
    has_orders: bool = False,
    dtype: torch.dtype = FLOATS[0],
) -> None:
    num_rows, num_tokens, num_inputs = sum(counts), 7, num_groups * group_size
    orders = noise_orders(len(counts), num_inputs) if has_orders else None
    weight = noise_weight(len(counts) * num_outputs, num_groups, kind, group_size=group_size, orders=orders)
    x = randn(num_tokens, num_inputs, dtype=dtype)
    sources = torch.arange(num_rows, device=DEVICE) * 5 % num_tokens
    where = {"sources_S": sources, "starts": torch.tensor([0, *counts], device=DEVICE).cumsum(0)}
    got = grouped_quantized_matmul(x, weight, **where)
    expected = reference(as_multiplied(x, weight), weight, **where)
    assert got.dtype == dtype
    assert got.shape == (num_rows, num_outputs)
    if not num_rows:
        return
    error = (got.float() - expected).norm() / expected.norm()
    assert error < allowed_error(weight, dtype), float(error)
    assert_close(got, expected, tolerance=float(expected.abs().max()) / 50)


def check_agrees_with_the_reference_for_any_number_of_rows() -> None:
    for kind in KINDS:
        for counts in ([1], [0, 3, 0], [16, 1, 17, 0, 40], [0, 0, 0, 2]):
            for dtype in FLOATS:
                _assert_agrees(counts, kind, dtype=dtype)


def check_agrees_with_the_reference_for_outputs_that_are_no_multiple_of_a_tile() -> None:
    for kind in KINDS:
        for num_outputs in (1, 65, 130):
            _assert_agrees([5, 0, 20], kind, num_outputs=num_outputs)


def check_every_size_of_tile_agrees_with_the_reference() -> None:
    for kind in KINDS:
        for counts in ([60, 1], [90, 20], [150, 0], [3, 300]):  # 32, 64 and 128 rows
            _assert_agrees(counts, kind, num_groups=1, num_outputs=70)
        _assert_agrees([3, 300], kind, num_groups=1, num_outputs=140)


def check_groups_may_be_smaller() -> None:
    for group_size in GROUPS:
        for kind in KINDS:
            _assert_agrees([3, 0, 18], kind, num_groups=5, group_size=group_size)


def check_every_expert_may_have_an_order_of_its_inputs() -> None:
    for kind in KINDS:
        _assert_agrees([3, 0, 18, 1], kind, has_orders=True)


def check_the_reference_multiplies_a_row_by_the_weights_of_its_expert() -> None:
    orders = noise_orders(3, 2 * GROUP)
    for kind in KINDS:
        x, weight = randn(4, 2 * GROUP), noise_weight(3 * 5, 2, kind, orders=orders)
        sources = torch.tensor([2, 0, 2, 3], device=DEVICE)
        got = reference(x, weight, sources_S=sources, starts=torch.tensor([0, 1, 1, 4], device=DEVICE))
        for row, expert in enumerate([0, 2, 2, 2]):
            rows = slice(5 * expert, 5 * expert + 5)
            alone = QuantizedWeight(
                numbers_NK=weight.numbers_NK[rows],
                scales_NJ=weight.scales_NJ[rows],
                zeros_NJ=None if weight.zeros_NJ is None else weight.zeros_NJ[rows],
                orders_EK=orders[expert : expert + 1],
            )
            assert_close(got[row], linear_reference(x[sources[row : row + 1]], alone)[0], tolerance=1e-4)


def check_rows_come_out_the_same_to_the_last_bit_whatever_tiles_they_lie_in() -> None:
    for kind in KINDS:
        x, weight = randn(40, 3 * GROUP, dtype=FLOATS[0]), noise_weight(2 * 32, 3, kind)
        alone, crowd = (
            grouped_quantized_matmul(
                x,
                weight,
                sources_S=torch.arange(count, device=DEVICE),
                starts=torch.tensor([0, 0, count], device=DEVICE),
            )
            for count in (1, 40)
        )
        if DEVICE == "cuda":  # the interpreter multiplies with numpy, whose order depends on the shape
            assert torch.equal(alone[0], crowd[0])
        assert_close(alone[0], crowd[0], tolerance=1e-3)


def check_no_rows_are_no_launch() -> None:
    for kind in KINDS:
        _assert_agrees([0, 0], kind)


def check_weights_that_are_not_those_of_the_experts_are_refused() -> None:
    x, sources = randn(2, GROUP), torch.arange(2, device=DEVICE)
    orders = noise_orders(2, GROUP)
    for weight, num_experts, message in (
        (noise_weight(7, 1, "int8"), 2, "7 rows of weights are not those of 2 experts"),
        (noise_weight(8, 1, "int8", orders=orders), 4, "8 rows of weights are not those of 4 experts"),
        (noise_weight(8, 2, "int8"), 2, f"rows of {GROUP} inputs for weights of {2 * GROUP}"),
    ):
        starts = torch.full((num_experts + 1,), 2, device=DEVICE)
        refusal = ""
        try:
            grouped_quantized_matmul(x, weight, sources_S=sources, starts=starts)
        except ValueError as error:
            refusal = str(error)
        assert message in refusal, (message, refusal)


def _launch(num_rows: int, kind: str, group_size: int = GROUP) -> object:
    num_experts, num_outputs, num_inputs = 8, 28_672, 4096
    return grouped_quantized_matmul(
        shape_only(2048, num_inputs, dtype=torch.bfloat16),
        weight_shape_only(num_experts * num_outputs, num_inputs, kind, group_size=group_size),
        sources_S=shape_only(num_rows, dtype=torch.int64),
        starts=shape_only(num_experts + 1, dtype=torch.int64),
    )


SHIPPED = [
    Shipped(
        name=f"{kind}_{num_rows}_rows",
        launch=lambda num_rows=num_rows, kind=kind: _launch(num_rows, kind),
        units=(None, "wgmma") if kind == "fp8" else ("wgmma",),
    )
    for kind in KINDS
    for num_rows in (16, 256, 512, 4096)
] + [
    Shipped(
        name=f"{kind}_groups_of_{group_size}_{num_rows}_rows",
        launch=lambda num_rows=num_rows, kind=kind, group_size=group_size: _launch(
            num_rows, kind, group_size
        ),
        units=(None, "wgmma") if kind == "fp8" else ("wgmma",),
    )
    for kind in KINDS
    for group_size in (64, 32)
    for num_rows in (16, 4096)
]
