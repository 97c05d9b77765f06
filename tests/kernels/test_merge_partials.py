"""Partial attention results merge to the attention over all keys, whatever the split."""

import itertools

import pytest
import torch

from kernels.merge_partials import merge_partials


def attend(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.einsum("thk,khc->thc", scores.softmax(-1), values), scores.logsumexp(-1)


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 19), (10, 11)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_merging_is_exact_for_any_split(cuts: tuple[int, ...], scale: float) -> None:
    scores, values = scale * torch.randn(4, 3, 20), torch.randn(20, 3, 8)
    bounds = [0, *cuts, 20]
    parts = [attend(scores[..., a:b], values[a:b]) for a, b in itertools.pairwise(bounds)]
    merged = merge_partials(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    torch.testing.assert_close(merged, attend(scores, values), atol=1e-5, rtol=1e-5)


def test_an_empty_part_changes_nothing() -> None:
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    merged = merge_partials(
        torch.stack([out, torch.full_like(out, 5.0)]), torch.stack([lse, torch.full_like(lse, -torch.inf)])
    )
    torch.testing.assert_close(merged, (out, lse))


def test_nothing_but_empty_parts_is_empty() -> None:
    out, lse = merge_partials(torch.ones(2, 1, 1, 4), torch.full((2, 1, 1), -torch.inf))
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 3, 4\], got \[2, 3\]"):
        merge_partials(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3))
