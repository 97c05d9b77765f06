"""Single tokens over paged contexts: every grouping, width, window and kind of KV, against the plain formula."""

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

from kernels.gpu import paged_attention as op
from kernels.gpu.merge_partials import merge_partials
from kernels.gpu.paged_kv import SCALED


def _assert_agrees(
    lengths: list[int],
    *,
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> None:
    num_heads, num_kv_heads = heads
    kv = make_kv(lengths, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=kv_dtype)
    q = randn(len(lengths), num_heads, head_dim, dtype=dtype)
    where = {
        "rows_T": torch.arange(len(lengths), device=DEVICE),
        "lengths_T": torch.tensor(lengths, device=DEVICE),
        "window": window,
        "scale": head_dim**-0.5,
    }
    assert_attends_as(op.reference(q, kv, **where), op.paged_attention(q, kv, **where), dtype=dtype)
    assert_guards_untouched(kv.pages_P2GBC)


def check_agrees_with_the_reference_for_every_grouping_and_width() -> None:
    lengths = [1, 15, 0, 64, 100]
    for heads, head_dim in [((2, 2), 8), ((6, 2), 24), ((5, 1), 64), ((20, 1), 128)]:
        for dtype in FLOATS:
            _assert_agrees(lengths, heads=heads, head_dim=head_dim, window=None, dtype=dtype, kv_dtype=dtype)


def check_agrees_with_the_reference_where_contexts_are_split() -> None:
    lengths = [1, op.SPAN - 1, op.SPAN, op.SPAN + 1, 2 * op.SPAN + 100, 0]
    _assert_agrees(lengths, heads=(2, 1), head_dim=32, window=None, dtype=FLOATS[0], kv_dtype=FLOATS[0])


def check_a_window_hides_what_lies_before_it() -> None:
    for window in (1, 16, 70, 600):
        lengths = [5, 100, op.SPAN + 30]
        _assert_agrees(lengths, heads=(2, 1), head_dim=16, window=window, dtype=FLOATS[0], kv_dtype=FLOATS[0])


def check_agrees_with_the_reference_for_scaled_kv() -> None:
    for kv_dtype in SCALED:
        _assert_agrees(
            [1, 70, op.SPAN + 3], heads=(4, 2), head_dim=32, window=None, dtype=FLOATS[0], kv_dtype=kv_dtype
        )


def check_queries_may_be_the_first_channels_of_wider_rows() -> None:
    kv = make_kv([40, 3], num_kv_heads=1, head_dim=16, dtype=FLOATS[0])
    rows = randn(2, 4 * 16, dtype=FLOATS[0])
    where = {"rows_T": torch.tensor([0, 1]), "lengths_T": torch.tensor([40, 3])}
    where = {name: x.to(DEVICE) for name, x in where.items()} | {"window": None, "scale": 0.25}
    wide = op.paged_attention(rows[:, :32].view(2, 2, 16), kv, **where)
    narrow = op.paged_attention(rows[:, :32].clone().view(2, 2, 16), kv, **where)
    assert torch.equal(wide[0], narrow[0])


def check_a_token_comes_out_the_same_to_the_last_bit_in_any_batch() -> None:
    lengths = [op.SPAN + 9, 30, 7]
    kv = make_kv(lengths, num_kv_heads=1, head_dim=16, dtype=FLOATS[0])
    q, rows, ends = randn(3, 2, 16, dtype=FLOATS[0]), torch.arange(3), torch.tensor(lengths)
    together = op.paged_attention(
        q, kv, rows_T=rows.to(DEVICE), lengths_T=ends.to(DEVICE), window=None, scale=0.25
    )
    for t in range(3):
        alone = op.paged_attention(
            q[t : t + 1], kv, rows_T=rows[t : t + 1].to(DEVICE), lengths_T=ends[t : t + 1].to(DEVICE),
            window=None, scale=0.25,
        )  # fmt: skip
        assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, together, strict=True))


def check_a_context_split_in_two_merges_to_the_whole() -> None:
    kv = make_kv([64], num_kv_heads=1, head_dim=32, dtype=FLOATS[0])
    q, row = randn(1, 3, 32, dtype=FLOATS[0]), torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def attend(first_page: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = type(kv)(
            pages_P2GBC=kv.pages_P2GBC, scales_P2GB=None, table_RL=kv.table_RL[:, first_page:].contiguous()
        )
        lengths = torch.tensor([length], device=DEVICE)
        return op.paged_attention(q, part, rows_T=row, lengths_T=lengths, window=None, scale=0.2)

    whole, parts = attend(0, 64), (attend(0, 16), attend(1, 48))
    merged = merge_partials(
        torch.stack([out.float() for out, _ in parts]),
        torch.stack([lse for _, lse in parts]),
        dtype=FLOATS[0],
    )
    assert_attends_as(whole, merged, dtype=FLOATS[0])


def check_no_tokens_are_no_launch() -> None:
    kv = make_kv([5], num_kv_heads=1, head_dim=16, dtype=torch.float32)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out, lse = op.paged_attention(
        randn(0, 2, 16), kv, rows_T=nothing, lengths_T=nothing, window=None, scale=1.0
    )
    assert out.shape == (0, 2, 16)
    assert lse.shape == (0, 2)


def _launch(*, group: int, head_dim: int, kv_dtype: torch.dtype, window: int | None = None) -> object:
    kv = kv_shape_only(num_rows=16, num_kv_heads=8, head_dim=head_dim, dtype=kv_dtype)
    ids = shape_only(16, dtype=torch.int64)
    q = shape_only(16, 8 * group, head_dim, dtype=torch.bfloat16)
    return op.paged_attention(q, kv, rows_T=ids, lengths_T=ids, window=window, scale=0.1)


SHIPPED = [
    Shipped(name=name, launch=lambda arguments=arguments: _launch(**arguments), units=("mma.sync", None))
    for name, arguments in {
        "bf16": {"group": 4, "head_dim": 128, "kv_dtype": torch.bfloat16},
        "int8": {"group": 4, "head_dim": 128, "kv_dtype": torch.int8},
        "fp8": {"group": 4, "head_dim": 128, "kv_dtype": torch.float8_e4m3fn},
        "bf16_head_dim_64": {"group": 8, "head_dim": 64, "kv_dtype": torch.bfloat16},
        "bf16_window": {"group": 4, "head_dim": 128, "kv_dtype": torch.bfloat16, "window": 4096},
    }.items()
]
