"""Chunks of prompts over their paged contexts: ragged, empty, one token, across tiles, against the plain formula."""

import torch
from hopper import Shipped
from inputs import (
    DEVICE,
    FLOATS,
    TOLERANCE,
    assert_attends_as,
    assert_close,
    assert_guards_untouched,
    kv_shape_only,
    make_kv,
    randn,
    shape_only,
)

from kernels.gpu import prefill_attention as op
from kernels.gpu.paged_kv import SCALED


def _assert_agrees(
    chunks: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 16,
    window: int | None = None,
    dtype: torch.dtype = FLOATS[0],
    kv_dtype: torch.dtype = FLOATS[0],
) -> None:
    """Of chunks (tokens before, tokens of the chunk)."""
    lengths, sizes = [before + size for before, size in chunks], [size for _, size in chunks]
    kv = make_kv(lengths, num_kv_heads=heads[1], head_dim=head_dim, dtype=kv_dtype)
    q = randn(sum(sizes), heads[0], head_dim, dtype=dtype)
    where = {
        "starts": torch.tensor([0, *sizes], device=DEVICE).cumsum(0).int(),
        "lengths_R": torch.tensor(lengths, device=DEVICE).int(),
        "window": window,
        "scale": head_dim**-0.5,
    }
    assert_attends_as(op.reference(q, kv, **where), op.prefill_attention(q, kv, **where), dtype=dtype)
    assert_guards_untouched(kv.pages_P2GBC)


def check_agrees_with_the_reference_for_ragged_chunks() -> None:
    chunks = [(0, 1), (0, 0), (17, 3), (0, 63), (64, 64), (130, 65), (5, 0), (3, 128)]
    for dtype in FLOATS:
        _assert_agrees(chunks, dtype=dtype, kv_dtype=dtype)


def check_agrees_with_the_reference_for_every_grouping_and_width() -> None:
    for heads, head_dim in [((3, 3), 64), ((6, 2), 24), ((7, 1), 128)]:
        _assert_agrees([(20, 50), (0, 9)], heads=heads, head_dim=head_dim)


def check_a_window_hides_what_lies_before_it() -> None:
    for window in (1, 16, 70):
        _assert_agrees([(0, 90), (100, 20), (200, 1)], window=window)


def check_agrees_with_the_reference_for_scaled_kv() -> None:
    for kv_dtype in SCALED:
        _assert_agrees([(70, 40), (0, 5)], heads=(4, 2), head_dim=32, kv_dtype=kv_dtype)


def check_one_token_is_what_decoding_gives() -> None:
    from kernels.gpu.paged_attention import paged_attention

    kv = make_kv([90, 33], num_kv_heads=1, head_dim=32, dtype=FLOATS[0])
    q, lengths = randn(2, 4, 32, dtype=FLOATS[0]), torch.tensor([90, 33], device=DEVICE)
    rows = torch.arange(3, device=DEVICE)
    prefilled = op.prefill_attention(q, kv, starts=rows, lengths_R=lengths, window=None, scale=0.2)
    decoded = paged_attention(q, kv, rows_T=rows[:2], lengths_T=lengths, window=None, scale=0.2)
    for got, expected in zip(prefilled, decoded, strict=True):
        assert_close(got, expected, tolerance=TOLERANCE[FLOATS[0]])


def check_no_tokens_are_no_launch() -> None:
    kv = make_kv([5], num_kv_heads=1, head_dim=16, dtype=torch.float32)
    zeros = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    out, _ = op.prefill_attention(
        randn(0, 2, 16), kv, starts=zeros, lengths_R=zeros[:1], window=None, scale=1.0
    )
    assert out.shape == (0, 2, 16)


def _launch(*, group: int, head_dim: int, kv_dtype: torch.dtype, window: int | None = None) -> object:
    kv = kv_shape_only(num_rows=16, num_kv_heads=8, head_dim=head_dim, dtype=kv_dtype)
    q = shape_only(512, 8 * group, head_dim, dtype=torch.bfloat16)
    starts, lengths = shape_only(17, dtype=torch.int32), shape_only(16, dtype=torch.int32)
    return op.prefill_attention(q, kv, starts=starts, lengths_R=lengths, window=window, scale=0.1)


SHIPPED = [
    Shipped(name=name, launch=lambda arguments=arguments: _launch(**arguments), units=("wgmma",))
    for name, arguments in {
        "bf16": {"group": 4, "head_dim": 128, "kv_dtype": torch.bfloat16},
        "int8": {"group": 4, "head_dim": 128, "kv_dtype": torch.int8},
        "fp8": {"group": 4, "head_dim": 128, "kv_dtype": torch.float8_e4m3fn},
        "bf16_head_dim_64": {"group": 8, "head_dim": 64, "kv_dtype": torch.bfloat16},
        "bf16_window": {"group": 4, "head_dim": 128, "kv_dtype": torch.bfloat16, "window": 4096},
    }.items()
]
