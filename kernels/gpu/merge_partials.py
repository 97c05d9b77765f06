"""Partial attention results over disjoint sets of keys, merged exactly.

lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) out_i (Dao et al., "FlashAttention", 2022, and everything
split-K). A set that was empty has lse = -inf and adds nothing: its out is not read and may be anything.

I partial results, T tokens, H query heads, C head dimension (CP: up to the next power of two).
"""

import torch
import triton
import triton.language as tl

_PARTIALS = 16  # read at once


def reference(out_ITHC: torch.Tensor, lse_ITH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C], lse [T, H]) in float32; where all sets are empty, 0 and -inf."""
    lse_TH = lse_ITH.logsumexp(0)
    weight_ITH1 = (lse_ITH - lse_TH.nan_to_num(neginf=0.0)).exp().unsqueeze(-1)
    parts_ITHC = torch.where(weight_ITH1 > 0, out_ITHC.float(), 0.0)
    return (weight_ITH1 * parts_ITHC).sum(0), lse_TH


@triton.jit(do_not_specialize=["num_partials", "num_rows"])
def _kernel(
    parts, lses, out, lse, num_partials, num_rows, C: tl.constexpr, CP: tl.constexpr, PARTIALS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CP)
    top, total, acc_C = -float("inf"), 0.0, tl.zeros([CP], tl.float32)
    for first in range(0, num_partials, PARTIALS):
        i = first + tl.arange(0, PARTIALS)
        lse_I = tl.load(lses + i * num_rows + row, mask=i < num_partials, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(lse_I, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight_I = tl.exp(lse_I - shift)
        holds_IC = (lse_I > -float("inf"))[:, None] & (c < C)[None, :]
        part_IC = tl.load(parts + (i * num_rows + row)[:, None] * C + c[None, :], mask=holds_IC, other=0.0)
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(weight_I, 0)
        acc_C = acc_C * shrink + tl.sum(part_IC.to(tl.float32) * weight_I[:, None], 0)
        top = new_top
    divisor = tl.where(total == 0, 1.0, total)
    tl.store(out + row * C + c, (acc_C / divisor).to(out.dtype.element_ty), mask=c < C)
    tl.store(lse + row, top + tl.log(divisor))


def merge_partials(
    out_ITHC: torch.Tensor, lse_ITH: torch.Tensor, *, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C] of `dtype`, lse [T, H] in float32)."""
    num_partials, num_tokens, num_heads, head_dim = out_ITHC.shape
    if lse_ITH.shape != out_ITHC.shape[:-1]:
        raise ValueError(f"lse must have shape {list(out_ITHC.shape[:-1])}, got {list(lse_ITH.shape)}")
    if not out_ITHC.is_contiguous() or not lse_ITH.is_contiguous():
        raise ValueError("partial results must be contiguous")
    out_THC = out_ITHC.new_empty(num_tokens, num_heads, head_dim, dtype=dtype)
    lse_TH = lse_ITH.new_empty(num_tokens, num_heads)
    num_rows = num_tokens * num_heads
    if num_rows:
        _kernel[(num_rows,)](
            out_ITHC, lse_ITH, out_THC, lse_TH, num_partials, num_rows,
            C=head_dim, CP=triton.next_power_of_2(head_dim), PARTIALS=_PARTIALS, num_warps=2,
        )  # fmt: skip
    return out_THC, lse_TH
