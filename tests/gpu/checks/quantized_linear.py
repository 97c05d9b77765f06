"""Products with weights of 8 and 4 bits against the product with the weights that they stand for."""

import torch
from hopper import Shipped
from inputs import DEVICE, FLOATS, assert_close, randn, shape_only
from quantized_noise import KINDS, allowed_error, as_multiplied, noise_orders, noise_weight, weight_shape_only

from kernels.gpu.quantized_linear import quantized_linear, reference
from kernels.gpu.quantized_weight import GROUP, GROUPS, QuantizedWeight


def _assert_agrees(x: torch.Tensor, weight: QuantizedWeight) -> None:
    got, expected = quantized_linear(x, weight), reference(as_multiplied(x, weight), weight)
    assert got.dtype == x.dtype
    error = (got.float() - expected).norm() / expected.norm()
    assert error < allowed_error(weight, x.dtype), float(error)
    assert_close(got, expected, tolerance=float(expected.abs().max()) / 50)


def check_agrees_with_the_reference_for_few_tokens() -> None:
    for kind in KINDS:
        for num_tokens, num_outputs, num_groups in [(1, 64, 1), (3, 100, 3), (17, 65, 4)]:
            for dtype in FLOATS:
                x = randn(num_tokens, num_groups * GROUP, dtype=dtype)
                _assert_agrees(x, noise_weight(num_outputs, num_groups, kind))


def check_agrees_with_the_reference_for_many_tokens() -> None:
    for kind in KINDS:
        _assert_agrees(randn(130, 2 * GROUP, dtype=FLOATS[0]), noise_weight(140, 2, kind))


def check_groups_may_be_smaller() -> None:
    for group_size in GROUPS:
        for kind in KINDS:
            for num_tokens, num_groups in [(2, 3), (5, 40), (70, 3)]:  # in one part, in several, many tokens
                x = randn(num_tokens, num_groups * group_size, dtype=FLOATS[0])
                _assert_agrees(x, noise_weight(40, num_groups, kind, group_size=group_size))


def check_inputs_may_have_an_order_of_their_own() -> None:
    orders = noise_orders(1, 2 * GROUP)
    for kind in KINDS:
        x, weight = randn(3, 2 * GROUP, dtype=FLOATS[0]), noise_weight(40, 2, kind, orders=orders)
        _assert_agrees(x, weight)
        inputs = torch.eye(2 * GROUP, device=DEVICE)[:1].to(x.dtype)  # input 0 alone
        place = int((orders[0] == 0).nonzero())
        in_order = noise_weight(40, 2, kind)
        assert torch.equal(weight.whole()[:, 0], in_order.whole()[:, place])
        assert_close(quantized_linear(inputs, weight)[0], in_order.whole()[:, place], tolerance=1e-2)


def check_parts_of_the_inputs_add_up_to_the_whole() -> None:
    for kind in KINDS:
        _assert_agrees(randn(2, 9 * GROUP, dtype=FLOATS[0]), noise_weight(16, 9, kind))


def check_a_token_comes_out_the_same_to_the_last_bit_among_few_others() -> None:
    for kind in KINDS:
        x, weight = randn(20, 8 * GROUP, dtype=FLOATS[0]), noise_weight(32, 8, kind)
        together = quantized_linear(x, weight)
        for t in (0, 19):
            alone = quantized_linear(x[t : t + 1], weight)
            if DEVICE == "cuda":  # the interpreter multiplies with numpy, whose order depends on the shape
                assert torch.equal(alone[0], together[t])
            assert_close(alone[0], together[t], tolerance=1e-3)


def check_a_row_of_zeros_gives_zeros() -> None:
    for kind in KINDS:
        assert not quantized_linear(torch.zeros(2, GROUP, device=DEVICE), noise_weight(16, 1, kind)).any()


def check_rows_may_be_apart_and_no_rows_are_no_launch() -> None:
    wide, weight = randn(3, 3 * GROUP, dtype=FLOATS[0]), noise_weight(40, 2, "int4")
    _assert_agrees(wide[:, : 2 * GROUP], weight)
    assert quantized_linear(wide[:0, : 2 * GROUP], weight).shape == (0, 40)


def _launch(num_tokens: int, kind: str, group_size: int = GROUP) -> object:
    weight = weight_shape_only(4096, 14_336, kind, group_size=group_size)
    return quantized_linear(shape_only(num_tokens, 14_336, dtype=torch.bfloat16), weight)


SHIPPED = [
    Shipped(
        name=f"{kind}_{num_tokens}_tokens",
        launch=lambda num_tokens=num_tokens, kind=kind: _launch(num_tokens, kind),
        units=(None, "wgmma") if kind == "fp8" else ("wgmma",),
    )
    for kind in KINDS
    for num_tokens in (1, 64, 2048)
] + [
    Shipped(
        name=f"{kind}_groups_of_{group_size}_{num_tokens}_tokens",
        launch=lambda num_tokens=num_tokens, kind=kind, group_size=group_size: _launch(
            num_tokens, kind, group_size
        ),
        units=(None, "wgmma") if kind == "fp8" else ("wgmma",),
    )
    for kind in KINDS
    for group_size in (64, 32)
    for num_tokens in (1, 2048)
]
