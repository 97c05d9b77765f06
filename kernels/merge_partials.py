"""Merges attention over disjoint sets of keys into attention over their union, exactly.

Partial i is (out_i, lse_i): the softmax-weighted mean of the values and the natural log of the sum of exp(scores).
With lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) out_i. An empty set has lse = -inf and any finite out.
Shapes: out [S, T, H, C], lse [S, T, H]; S partials, T tokens, H heads, C head dimension.
"""

import torch


def reference(out_STHC: torch.Tensor, lse_STH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged (out [T, H, C], lse [T, H]); where all sets are empty, out is 0 and lse is -inf."""
    top_TH = lse_STH.amax(0)
    # An empty union: subtract 0 instead of -inf, so that the weights become exp(-inf) = 0 and not NaN.
    scale_STH = torch.exp(lse_STH - torch.where(top_TH.isinf(), 0.0, top_TH))
    total_TH = scale_STH.sum(0)
    weight_STH = scale_STH / torch.where(total_TH == 0, 1.0, total_TH)
    out_THC = (out_STHC.float() * weight_STH.unsqueeze(-1)).sum(0).to(out_STHC.dtype)
    return out_THC, torch.where(total_TH == 0, -torch.inf, top_TH + torch.log(total_TH))


def merge_partials(out_STHC: torch.Tensor, lse_STH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if out_STHC.shape[:-1] != lse_STH.shape:
        raise ValueError(f"lse must have shape {list(out_STHC.shape[:-1])}, got {list(lse_STH.shape)}")
    return reference(out_STHC, lse_STH)
