"""Symbols and values bit for bit as the formulas give them, for chunks of any number of blocks."""

import torch
from hopper import Shipped
from inputs import (
    DEVICE,
    assert_equal_but_for_rounding,
    assert_guards_untouched,
    guarded_pool,
    randn,
    shape_only,
)

from kernels.gpu.quantize_kv import (
    MAX_STEPS,
    Bins,
    dequantize_,
    num_anchors,
    quantize,
    reference_dequantize,
    reference_quantize,
)

SHAPES = [(1, 1, 16, 8), (3, 4, 16, 24), (5, 2, 4, 64)]  # blocks, groups, tokens of a block, channels
DTYPES = (torch.float32, torch.bfloat16)


def _bins(num_groups: int, width: int) -> Bins:
    shape = (num_groups, width)
    return Bins(
        mean_GC=randn(*shape, seed=1),
        alpha_GC=randn(*shape, seed=2).abs().clamp(max=1),
        anchor_bin_GC=0.05 + 0.1 * randn(*shape, seed=3).abs(),
        delta_bin_GC=0.05 + 0.2 * randn(*shape, seed=4).abs(),
    )


def check_symbols_are_those_of_the_reference() -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            staging, bins = 2 * randn(*shape, dtype=dtype), _bins(shape[1], shape[3])
            for got, expected in zip(quantize(staging, bins), reference_quantize(staging, bins), strict=True):
                assert torch.equal(got, expected)


def check_values_are_those_of_the_reference() -> None:
    for shape in SHAPES:
        num_blocks, num_groups, block, width = shape
        num = num_anchors(num_blocks * block)
        generator = torch.Generator().manual_seed(9)
        symbols = [
            torch.randint(0, 2 * MAX_STEPS + 1, size, generator=generator, dtype=torch.uint8).to(DEVICE)
            for size in ((num_groups, num, width), (num_groups, num_blocks * block - num, width))
        ]
        bins = _bins(num_groups, width)
        for dtype in DTYPES:
            staging = guarded_pool(num_blocks, num_groups, block, width, dtype=dtype)
            dequantize_(staging, *symbols, bins)
            expected = reference_dequantize(*symbols, bins, block=block).to(dtype)
            assert_equal_but_for_rounding(staging, expected)
            assert_guards_untouched(staging)


def check_what_lies_beyond_the_last_bin_is_cut_and_nan_is_the_lowest() -> None:
    staging, bins = randn(1, 1, 16, 8), _bins(1, 8)
    staging[0, 0, :, 0], staging[0, 0, :, 1], staging[0, 0, :, 2] = 1e30, -1e30, torch.nan
    anchors, deltas = quantize(staging, bins)
    assert (anchors[..., 0] == 2 * MAX_STEPS).all()
    assert (deltas[..., 0] == 2 * MAX_STEPS).all()
    assert not anchors[..., 1:3].any()
    assert not deltas[..., 1:3].any()


def check_values_come_back_within_half_a_bin() -> None:
    staging, bins = 0.5 * randn(4, 2, 16, 32), _bins(2, 32)
    wide = Bins(
        mean_GC=bins.mean_GC,
        alpha_GC=bins.alpha_GC,
        anchor_bin_GC=bins.anchor_bin_GC + 0.4,
        delta_bin_GC=bins.delta_bin_GC + 0.4,
    )
    back = torch.empty_like(staging)
    dequantize_(back, *quantize(staging, wide), wide)
    half = torch.maximum(wide.anchor_bin_GC, wide.delta_bin_GC).unsqueeze(1) / 2
    assert ((back - staging).abs() <= half + 1e-5).all()


def check_no_blocks_are_no_launch() -> None:
    anchors, deltas = quantize(randn(0, 2, 16, 8), _bins(2, 8))
    assert anchors.shape == (2, 0, 8)
    assert deltas.shape == (2, 0, 8)


def _launch(*, quantizes: bool) -> object:
    staging, table = (
        shape_only(64, 512, 16, 128, dtype=torch.bfloat16),
        shape_only(512, 128, dtype=torch.float32),
    )
    bins = Bins(mean_GC=table, alpha_GC=table, anchor_bin_GC=table, delta_bin_GC=table)
    if quantizes:
        return quantize(staging, bins)
    num = num_anchors(64 * 16)
    sizes = (512, num, 128), (512, 64 * 16 - num, 128)
    return dequantize_(staging, *(shape_only(*size, dtype=torch.uint8) for size in sizes), bins)


SHIPPED = [
    Shipped(name="quantize", units=(None,), launch=lambda: _launch(quantizes=True)),
    Shipped(name="dequantize", units=(None,), launch=lambda: _launch(quantizes=False)),
]
