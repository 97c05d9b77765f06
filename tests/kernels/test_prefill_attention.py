"""Chunks over paged prefixes, against one masked softmax over everything."""

import pytest
import torch

from kernels.prefill_attention import prefill_attention, reference

BLOCK = 16


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("num_prefix", "num_tokens"), [(0, 2), (0, 70), (16, 9), (37, 50), (100, 3)])
@pytest.mark.parametrize("window", [None, 1, 5, 33, 500])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_agrees_with_the_reference(
    num_heads: int, num_kv_heads: int, num_prefix: int, num_tokens: int, window: int | None, head_dim: int
) -> None:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    k, v = torch.randn(2, num_prefix + num_tokens, num_kv_heads, head_dim, generator=generator)
    pages = torch.full((12, 2, num_kv_heads, BLOCK, head_dim), torch.nan)
    order = torch.randperm(12, generator=generator)
    for position in range(num_prefix):
        page = order[position // BLOCK]
        pages[page, 0, :, position % BLOCK], pages[page, 1, :, position % BLOCK] = k[position], v[position]
    got = prefill_attention(
        q, k[num_prefix:], v[num_prefix:], pages, prefix_pages=order, num_prefix=num_prefix, window=window,
        scale=0.3,
    )  # fmt: skip
    torch.testing.assert_close(got, reference(q, k, v, window=window, scale=0.3), atol=3e-6, rtol=3e-5)
