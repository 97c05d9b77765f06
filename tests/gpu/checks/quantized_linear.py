"""Products with weights of 8 and 4 bits against the product with the weights that they stand for."""

import torch
from hopper import Shipped
from inputs import DEVICE, FLOATS, assert_close, randn, shape_only

from kernels.gpu.quantized_linear import GROUP, GROUPS, QuantizedWeight, quantized_linear, reference

KINDS = ("int8", "fp8", "int4")


def _weight(
    num_outputs: int,
    num_groups: int,
    kind: str,
    *,
    group_size: int = GROUP,
    order: torch.Tensor | None = None,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(7)
    shape = (num_outputs, num_groups * group_size)
    if kind == "fp8":
        numbers = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    elif kind == "int8":
        numbers = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    else:
        half = (num_outputs, num_groups * group_size // 2)
        numbers = torch.randint(0, 256, half, generator=generator, dtype=torch.uint8)
    scales = (
        torch.rand(num_outputs, num_groups, generator=generator) / {"int8": 64, "fp8": 1, "int4": 4}[kind]
    )
    zeros = torch.randint(0, 16, scales.shape, generator=generator).float() if kind == "int4" else None
    return QuantizedWeight(
        numbers_NK=numbers.to(DEVICE),
        scales_NJ=scales.to(DEVICE),
        zeros_NJ=None if zeros is None else zeros.to(DEVICE),
        order_K=order,
    )


def _assert_agrees(x: torch.Tensor, weight: QuantizedWeight) -> None:
    got, expected = quantized_linear(x, weight), reference(x, weight)
    assert got.dtype == x.dtype
    error = (got.float() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[x.dtype], float(error)
    assert_close(got, expected, tolerance=float(expected.abs().max()) / 50)


def check_agrees_with_the_reference_for_few_tokens() -> None:
    for kind in KINDS:
        for num_tokens, num_outputs, num_groups in [(1, 64, 1), (3, 100, 3), (17, 65, 4)]:
            for dtype in FLOATS:
                x = randn(num_tokens, num_groups * GROUP, dtype=dtype)
                _assert_agrees(x, _weight(num_outputs, num_groups, kind))


def check_agrees_with_the_reference_for_many_tokens() -> None:
    for kind in KINDS:
        _assert_agrees(randn(130, 2 * GROUP, dtype=FLOATS[0]), _weight(140, 2, kind))


def check_groups_may_be_smaller() -> None:
    for group_size in GROUPS:
        for kind in ("int8", "int4"):
            for num_tokens, num_groups in [(2, 3), (5, 40), (70, 3)]:  # in one part, in several, many tokens
                x = randn(num_tokens, num_groups * group_size, dtype=FLOATS[0])
                _assert_agrees(x, _weight(40, num_groups, kind, group_size=group_size))


def check_inputs_may_have_an_order_of_their_own() -> None:
    order = torch.randperm(2 * GROUP, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for kind in ("int8", "int4"):
        x, weight = randn(3, 2 * GROUP, dtype=FLOATS[0]), _weight(40, 2, kind, order=order)
        _assert_agrees(x, weight)
        inputs = torch.eye(2 * GROUP, device=DEVICE)[:1].to(x.dtype)  # input 0 alone
        place = int((order == 0).nonzero())
        in_order = _weight(40, 2, kind)
        assert torch.equal(weight.whole()[:, 0], in_order.whole()[:, place])
        assert_close(quantized_linear(inputs, weight)[0], in_order.whole()[:, place], tolerance=1e-2)


def check_parts_of_the_inputs_add_up_to_the_whole() -> None:
    for kind in KINDS:
        _assert_agrees(randn(2, 9 * GROUP, dtype=FLOATS[0]), _weight(16, 9, kind))


def check_a_token_comes_out_the_same_to_the_last_bit_among_few_others() -> None:
    x, weight = randn(20, 8 * GROUP, dtype=FLOATS[0]), _weight(32, 8, "int8")
    together = quantized_linear(x, weight)
    for t in (0, 19):
        alone = quantized_linear(x[t : t + 1], weight)
        if DEVICE == "cuda":  # the interpreter multiplies with numpy, whose order depends on the shape
            assert torch.equal(alone[0], together[t])
        assert_close(alone[0], together[t], tolerance=1e-3)


def check_rows_may_be_apart_and_no_rows_are_no_launch() -> None:
    wide, weight = randn(3, 3 * GROUP, dtype=FLOATS[0]), _weight(40, 2, "int4")
    _assert_agrees(wide[:, : 2 * GROUP], weight)
    assert quantized_linear(wide[:0, : 2 * GROUP], weight).shape == (0, 40)


def _launch(num_tokens: int, kind: str, group_size: int = GROUP) -> object:
    num_outputs, num_inputs = 4096, 14_336
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[kind]
    weight = QuantizedWeight(
        numbers_NK=shape_only(num_outputs, num_inputs // (2 if kind == "int4" else 1), dtype=dtype),
        scales_NJ=shape_only(num_outputs, num_inputs // group_size, dtype=torch.float32),
        zeros_NJ=shape_only(num_outputs, num_inputs // group_size, dtype=torch.float32)
        if kind == "int4"
        else None,
    )
    return quantized_linear(shape_only(num_tokens, num_inputs, dtype=torch.bfloat16), weight)


SHIPPED = [
    Shipped(
        name=f"{kind}_{num_tokens}_tokens",
        launch=lambda num_tokens=num_tokens, kind=kind: _launch(num_tokens, kind),
        units=("wgmma",),
    )
    for kind in KINDS
    for num_tokens in (1, 64, 2048)
] + [
    Shipped(
        name=f"int4_groups_of_{group_size}_{num_tokens}_tokens",
        launch=lambda num_tokens=num_tokens, group_size=group_size: _launch(num_tokens, "int4", group_size),
        units=("wgmma",),
    )
    for group_size in (64, 32)
    for num_tokens in (1, 2048)
]
