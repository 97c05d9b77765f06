"""Shared prefixes and own contexts together, against attention over both as one."""

import torch
from hopper import Shipped
from inputs import (
    DEVICE,
    FLOATS,
    assert_attends_as,
    assert_guards_untouched,
    kv_shape_only,
    make_kv,
    randn,
    shape_only,
)

from kernels.gpu import shared_prefix_attention as op
from kernels.gpu.paged_kv import SCALED


def _assert_agrees(
    groups: list[tuple[int, list[int]]],
    *,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 16,
    dtype: torch.dtype = FLOATS[0],
    kv_dtype: torch.dtype = FLOATS[0],
) -> None:
    """Of groups (length of the prefix, lengths of the own contexts)."""
    prefix_lengths = [length for length, _ in groups]
    lengths = [length for _, own in groups for length in own]
    starts = torch.tensor([0, *(len(own) for _, own in groups)], device=DEVICE).cumsum(0)
    shape = {"num_kv_heads": heads[1], "head_dim": head_dim, "dtype": kv_dtype}
    prefixes = op.Prefixes(
        kv=make_kv(prefix_lengths, **shape, seed=2),
        prefix_lengths_N=torch.tensor(prefix_lengths, device=DEVICE),
        starts=starts,
    )
    kv = make_kv(lengths, **shape)
    q = randn(len(lengths), heads[0], head_dim, dtype=dtype)
    where = {
        "rows_T": torch.arange(len(lengths), device=DEVICE),
        "lengths_T": torch.tensor(lengths, device=DEVICE),
        "scale": head_dim**-0.5,
    }
    assert_attends_as(
        op.reference(q, prefixes, kv, **where),
        op.shared_prefix_attention(q, prefixes, kv, **where),
        dtype=dtype,
    )
    assert_guards_untouched(prefixes.kv.pages_P2GBC)


def check_agrees_with_the_reference_for_groups_of_any_size() -> None:
    groups = [(48, [3, 0, 17]), (0, [5, 70]), (op.SPAN + 16, [1]), (16, []), (64, [9] * 33)]
    for dtype in FLOATS:
        _assert_agrees(groups, dtype=dtype, kv_dtype=dtype)


def check_agrees_with_the_reference_for_every_grouping_and_width() -> None:
    for heads, head_dim in [((3, 3), 64), ((6, 2), 24), ((7, 1), 128)]:
        _assert_agrees([(80, [4, 20]), (16, [2])], heads=heads, head_dim=head_dim)


def check_agrees_with_the_reference_for_scaled_kv() -> None:
    for kv_dtype in SCALED:
        _assert_agrees([(80, [4, 20])], heads=(4, 2), head_dim=32, kv_dtype=kv_dtype)


def _launch(*, kv_dtype: torch.dtype) -> object:
    kv = kv_shape_only(num_rows=32, num_kv_heads=8, head_dim=128, dtype=kv_dtype)
    ids = shape_only(32, dtype=torch.int64)
    prefixes = op.Prefixes(kv=kv, prefix_lengths_N=ids[:1], starts=ids[:2])
    q = shape_only(32, 32, 128, dtype=torch.bfloat16)
    return op.shared_prefix_attention(q, prefixes, kv, rows_T=ids, lengths_T=ids, scale=0.1)


SHIPPED = [
    Shipped(name=name, launch=lambda dtype=dtype: _launch(kv_dtype=dtype), units=("mma.sync", "wgmma", None))
    for name, dtype in {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}.items()
]
