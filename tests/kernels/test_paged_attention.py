"""Single tokens over paged contexts: every grouping, width and window, against the plain formula."""

import pytest
import torch

from kernels import merge_partials
from kernels.paged_attention import paged_attention, reference

BLOCK = 16


def make_case(
    *, num_heads: int, num_kv_heads: int, head_dim: int, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    num_pages = [-(-length // BLOCK) for length in lengths]
    pages = torch.randn(sum(num_pages) + 2, 2, num_kv_heads, BLOCK, head_dim, generator=generator)
    order = torch.randperm(len(pages), generator=generator).int()
    table = torch.zeros(len(lengths), max(num_pages) + 1, dtype=torch.int32)
    start = 0
    for row, count in enumerate(num_pages):
        table[row, :count] = order[start : start + count]
        start += count
        if lengths[row] % BLOCK:  # what lies behind the context must not be read
            pages[table[row, count - 1], :, :, lengths[row] % BLOCK :] = torch.nan
    q = torch.randn(len(lengths), num_heads, head_dim, generator=generator)
    where = {
        "table_RL": table,
        "rows_T": torch.arange(len(lengths)),
        "lengths_T": torch.tensor(lengths),
    }
    return q, pages, where


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (8, 1), (5, 1), (7, 1), (2, 1)])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("window", [None, 1, 7, 16, 40])
def test_agrees_with_the_reference(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    q, pages, where = make_case(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, lengths=[1, 15, 16, 17, 33, 100, 0]
    )
    got = paged_attention(q, pages, **where, window=window, scale=head_dim**-0.5)
    expected = reference(q, pages, **where, window=window, scale=head_dim**-0.5)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 1, 9, 50])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (4, 4), (5, 1)])
def test_tokens_of_one_request_are_attended_together_and_see_their_own_context_alone(
    num_heads: int, num_kv_heads: int, window: int | None
) -> None:
    # Rows of a step: a decode, a chunk that takes several groups, another decode, a chunk of one group.
    counts, ends = [1, 45, 1, 3], [70, 60, 33, 3]
    _, pages, where = make_case(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=16, lengths=ends)
    where["rows_T"] = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    where["lengths_T"] = torch.cat(
        [torch.arange(end - count, end) + 1 for count, end in zip(counts, ends, strict=True)]
    )
    q = torch.randn(sum(counts), num_heads, 16, generator=torch.Generator().manual_seed(6))
    got = paged_attention(q, pages, **where, window=window, scale=0.25)
    expected = reference(q, pages, **where, window=window, scale=0.25)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5)


def test_tokens_of_one_request_may_have_any_lengths() -> None:
    q, pages, where = make_case(num_heads=4, num_kv_heads=2, head_dim=16, lengths=[40, 60])
    where["rows_T"], where["lengths_T"] = torch.tensor([1, 1]), torch.tensor([55, 12])
    got = paged_attention(q, pages, **where, window=None, scale=0.25)
    torch.testing.assert_close(
        got, reference(q, pages, **where, window=None, scale=0.25), atol=2e-6, rtol=2e-5
    )


def test_large_scores_stay_exact() -> None:
    q, pages, where = make_case(num_heads=4, num_kv_heads=2, head_dim=16, lengths=[40, 60])
    got = paged_attention(100 * q, pages, **where, window=None, scale=1.0)
    expected = reference(100 * q, pages, **where, window=None, scale=1.0)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_a_context_split_in_two_merges_to_the_whole() -> None:
    q, pages, where = make_case(num_heads=6, num_kv_heads=3, head_dim=32, lengths=[64])
    whole = paged_attention(q, pages, **where, window=None, scale=0.2)
    first = paged_attention(q, pages, **{**where, "lengths_T": torch.tensor([16])}, window=None, scale=0.2)
    rest = {**where, "table_RL": where["table_RL"][:, 1:].contiguous(), "lengths_T": torch.tensor([48])}
    second = paged_attention(q, pages, **rest, window=None, scale=0.2)
    merged = merge_partials.merge_partials(
        torch.stack([first[0], second[0]]), torch.stack([first[1], second[1]])
    )
    torch.testing.assert_close(merged, whole, atol=2e-6, rtol=2e-5)


def test_pages_of_another_size_are_refused() -> None:
    q, _, where = make_case(num_heads=4, num_kv_heads=2, head_dim=16, lengths=[4])
    with pytest.raises(ValueError, match="16 tokens"):
        paged_attention(q, torch.zeros(4, 2, 2, 8, 16), **where, window=None, scale=1.0)


def test_a_token_comes_out_the_same_to_the_last_bit_in_any_group() -> None:
    _, pages, where = make_case(num_heads=6, num_kv_heads=2, head_dim=24, lengths=[150])
    where["rows_T"], where["lengths_T"] = torch.zeros(150, dtype=torch.int64), torch.arange(1, 151)
    q = torch.randn(150, 6, 24, generator=torch.Generator().manual_seed(6))
    for window in (None, 20):
        together = paged_attention(q, pages, **where, window=window, scale=0.2)
        for first, count in ((0, 1), (149, 1), (10, 2), (33, 5), (90, 11)):
            part = slice(first, first + count)
            some = {**where, "rows_T": where["rows_T"][part], "lengths_T": where["lengths_T"][part]}
            alone = paged_attention(q[part], pages, **some, window=window, scale=0.2)
            assert all(torch.equal(a, b[part]) for a, b in zip(alone, together, strict=True))
