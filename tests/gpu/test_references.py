"""What the GPU's kernels are checked against is what the CPU computes.

Both have references of their own, because a bare GPU machine cannot import the CPU's; here they meet.
"""

import numpy as np
import pytest
import torch

import kernels.merge_partials
import kernels.paged_attention
import kernels.rms_norm
import kernels.rotary
import kernels.sample
import kernels.silu_mul
import kvstore.codec.quantize
from kernels.gpu import (
    grouped_matmul,
    merge_partials,
    paged_attention,
    prefill_attention,
    quantize_kv,
    rms_norm,
    rotate_and_store,
    sample,
    silu_mul,
)
from kernels.gpu.paged_kv import PagedKv
from tests.kvstore.codec.coding import arena_of, layout_of

BLOCK = 16


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kv_of_two_requests() -> PagedKv:
    table = torch.tensor([[4, 1, 0], [2, 5, 3]], dtype=torch.int32)
    return PagedKv(pages_P2GBC=randn(6, 2, 2, BLOCK, 8), scales_P2GB=None, table_RL=table)


@pytest.mark.parametrize("window", [None, 7])
def test_attention_of_single_tokens(window: int | None) -> None:
    kv, q = kv_of_two_requests(), randn(3, 4, 8)
    where = {"rows_T": torch.tensor([1, 0, 1]), "lengths_T": torch.tensor([40, 17, 0]), "window": window}
    got = paged_attention.reference(q, kv, **where, scale=0.3)
    expected = kernels.paged_attention.reference(q, kv.pages_P2GBC, table_RL=kv.table_RL, **where, scale=0.3)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("window", [None, 7])
def test_attention_of_chunks_is_that_of_their_tokens(window: int | None) -> None:
    kv, q = kv_of_two_requests(), randn(8, 4, 8)
    starts, lengths = torch.tensor([0, 5, 8]), torch.tensor([21, 40])
    got = prefill_attention.reference(q, kv, starts=starts, lengths_R=lengths, window=window, scale=0.3)
    expected = kernels.paged_attention.reference(
        q,
        kv.pages_P2GBC,
        table_RL=kv.table_RL,
        rows_T=torch.tensor([0] * 5 + [1] * 3),
        lengths_T=torch.tensor([17, 18, 19, 20, 21, 38, 39, 40]),
        window=window,
        scale=0.3,
    )
    torch.testing.assert_close(got, expected)


def test_merging() -> None:
    parts, lses = randn(3, 2, 2, 8), randn(3, 2, 2, seed=1)
    lses[1, 0] = -torch.inf
    lses[:, 1, 1] = -torch.inf
    torch.testing.assert_close(
        merge_partials.reference(parts, lses), kernels.merge_partials.reference(parts, lses)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_gates(dtype: torch.dtype) -> None:
    x, weight = randn(3, 64).to(dtype), randn(64, seed=1).to(dtype)
    assert torch.equal(
        rms_norm.reference(x, weight, eps=1e-6), kernels.rms_norm.reference(x, weight, eps=1e-6)
    )
    torch.testing.assert_close(
        silu_mul.reference(x), kernels.silu_mul.reference(x.float()).float(), atol=1e-6, rtol=1e-6
    )


def test_rotation_and_pages() -> None:
    positions, slots = torch.tensor([3, 70]), torch.tensor([2, 33])
    angles = randn(80, 4)
    arguments = {
        "cos_XF": angles.cos(),
        "sin_XF": angles.sin(),
        "q_norm_C": randn(8, seed=1),
        "k_norm_C": randn(8, seed=2),
        "eps": 1e-6,
    }
    qkv, pages = randn(2, (4 + 2 * 2) * 8), randn(3, 2, 2, BLOCK, 8)
    expected_qkv, expected_pages = qkv.clone(), pages.clone()
    step = {"positions_T": positions, "slots_T": slots}
    rotate_and_store.reference_(qkv, pages, None, rotate_and_store.Rotation(**arguments), **step)
    kernels.rotary.reference_rotate_and_store_(
        expected_qkv, expected_pages, kernels.rotary.Rotation(**arguments), **step
    )
    assert torch.equal(pages, expected_pages)
    assert torch.equal(qkv[:, : 4 * 8], expected_qkv[:, : 4 * 8])


def test_draws() -> None:
    columns = {
        "temperature": [0.0, 1.0, 0.6, 1.2],
        "top_k": [0, 5, 0, 30],
        "top_p": [1.0, 1.0, 0.7, 0.9],
        "min_p": [0.0, 0.0, 0.05, 0.01],
        "uniform": [0.5, 0.1, 0.99, 0.7],
    }
    arrays = {name: np.array(column) for name, column in columns.items()}
    # float32 is what the GPU is given; the CPU gets the same number.
    arrays["temperature"] = arrays["temperature"].astype(np.float32).astype(np.float64)
    logits = 3 * randn(4, 200)
    got = sample.reference(logits, sample.Draws(**{name: torch.from_numpy(x) for name, x in arrays.items()}))
    assert torch.equal(got, kernels.sample.reference(logits, kernels.sample.Draws(**arrays)))


def test_products_of_experts() -> None:
    x, weight, sources = randn(4, 8), randn(3, 6, 8, seed=1), torch.tensor([2, 0, 2, 3])
    got = grouped_matmul.reference(x, weight, sources_S=sources, starts=torch.tensor([0, 1, 1, 4]))
    for row, (source, expert) in enumerate(zip(sources.tolist(), [0, 2, 2, 2], strict=True)):
        torch.testing.assert_close(got[row], weight[expert] @ x[source])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_symbols_and_values_of_the_codec_bit_for_bit(dtype: str) -> None:
    layout, num_blocks = layout_of(dtype), 3
    num_groups = kvstore.codec.quantize.num_groups(layout)
    arena, slots = arena_of(layout, num_blocks=num_blocks), range(num_blocks)
    shape = num_groups, layout.head_dim
    tables = {
        "mean_GC": randn(*shape, seed=1),
        "alpha_GC": randn(*shape, seed=2).abs(),
        "anchor_bin_GC": 0.02 + randn(*shape, seed=3).abs() / 8,
        "delta_bin_GC": 0.02 + randn(*shape, seed=4).abs() / 8,
    }
    cpu_bins = kvstore.codec.quantize.Bins(**{name: table.numpy() for name, table in tables.items()})
    expected = kvstore.codec.quantize.quantize(arena, slots, cpu_bins, layout=layout)
    staging = torch.from_numpy(arena).view(getattr(torch, dtype))
    staging = staging.view(num_blocks, num_groups, layout.block_size_tokens, layout.head_dim)
    bins = quantize_kv.Bins(**tables)
    got = quantize_kv.reference_quantize(staging, bins)
    assert all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(got, expected, strict=True))
    out = np.empty_like(arena)
    kvstore.codec.quantize.dequantize_(out, slots, expected, cpu_bins, layout=layout)
    values = quantize_kv.reference_dequantize(*got, bins, block=layout.block_size_tokens)
    assert np.array_equal(
        values.to(staging.dtype).contiguous().view(torch.uint8).numpy().reshape(out.shape), out
    )
