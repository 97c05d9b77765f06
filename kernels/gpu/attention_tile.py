"""What every attention here is made of: rows of queries against a run of a paged context, with a running softmax.

Row m sees the positions s with sees_m - window <= s < sees_m. Over the tiles of a run it keeps, in base 2,
top = max_s x_s, total = sum_s 2^(x_s - top), acc = sum_s 2^(x_s - top) v_s, with x_s = scale log2(e) q.k_s
(Dao, "FlashAttention-2", 2023). Rows are the query heads of one key/value head, of one token or of many, so that a tile
of keys and values is read once for all of them and they fill a tensor core's tile.

M rows, S tokens of a tile, C head dimension (CP: up to the next power of two).

T tokens, H query heads, G key/value heads, B tokens per page. Every attention's kernel takes `operands` first, and
`constants` among its own.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.paged_kv import PagedKv, load_scales, load_tile, padded_width
from kernels.gpu.tiling import Tiling

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(
    q_MC, top_M, total_M, acc_MC, sees_M, begin, end, window, scale, pages, scales, table, kv_head,
    G: tl.constexpr, B: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Adds positions begin to end - 1. Without MASKED every row sees all of them, and they are whole tiles."""
    qk_MC = q_MC
    if pages.dtype.element_ty == tl.float8e4nv and q_MC.dtype == tl.bfloat16:
        # A Hopper turns fp8 into float16 in fewer steps than into bfloat16: 760 instructions a tile instead of 842
        # (sm_90, Triton 3.7). Not so the values: weights times their scales may be too small for float16.
        qk_MC = q_MC.to(tl.float16)
    for start in tl.range(begin, end, TILE):
        s = start + tl.arange(0, TILE)
        exists_S = s < end
        page_S = tl.load(table + s // B, mask=exists_S, other=0).to(tl.int64)
        k_SC = load_tile(pages, page_S, s % B, kv_head, exists_S, 2 * G, B, C, CP, MASKED)
        x_MS = tl.dot(qk_MC, tl.trans(k_SC.to(qk_MC.dtype)), input_precision="ieee") * (scale * LOG2_E)
        if SCALED:
            x_MS *= load_scales(scales, page_S, s % B, kv_head, exists_S, 2 * G, B, MASKED)[None, :]
        if MASKED:
            visible_MS = (s[None, :] < sees_M[:, None]) & exists_S[None, :]
            if HAS_WINDOW:
                visible_MS &= s[None, :] >= sees_M[:, None] - window
            x_MS = tl.where(visible_MS, x_MS, -float("inf"))
        new_top_M = tl.maximum(top_M, tl.max(x_MS, 1))
        # A row that has seen nothing yet: subtract 0, so that its weights are 2^-inf = 0 and not NaN.
        shift_M = tl.where(new_top_M == -float("inf"), 0.0, new_top_M) if MASKED else new_top_M
        p_MS = tl.exp2(x_MS - shift_M[:, None])
        shrink_M = tl.exp2(top_M - shift_M)
        total_M = total_M * shrink_M + tl.sum(p_MS, 1)
        acc_MC *= shrink_M[:, None]
        v_SC = load_tile(pages, page_S, s % B, G + kv_head, exists_S, 2 * G, B, C, CP, MASKED)
        if SCALED:
            p_MS *= load_scales(scales, page_S, s % B, G + kv_head, exists_S, 2 * G, B, MASKED)[None, :]
        acc_MC = tl.dot(p_MS.to(q_MC.dtype), v_SC.to(q_MC.dtype), acc_MC, input_precision="ieee")
        top_M = new_top_M
    return top_M, total_M, acc_MC


@triton.jit
def finish(top_M, total_M, acc_MC):
    """(out, lse) of the rows, the latter by e; a row that saw nothing gives 0 and -inf."""
    divisor_M = tl.where(total_M == 0, 1.0, total_M)
    return acc_MC / divisor_M[:, None], (top_M + tl.log2(divisor_M)) * LN_2


def operands(q_THC: torch.Tensor, kv: PagedKv) -> tuple[torch.Tensor | int | None, ...]:
    """q, stride_q, pages, scales, table, stride_table. Raises ValueError where these queries cannot be asked of it."""
    num_heads, head_dim = q_THC.shape[1:]
    if head_dim != kv.head_dim or num_heads % kv.num_kv_heads:
        raise ValueError(
            f"queries {[num_heads, head_dim]} do not fit {kv.num_kv_heads} heads of {kv.head_dim}"
        )
    if q_THC.stride()[1:] != (head_dim, 1):
        raise ValueError(f"the heads of a query must be contiguous, got strides {q_THC.stride()}")
    return q_THC, q_THC.stride(0), kv.pages_P2GBC, kv.scales_P2GB, kv.table_RL, kv.table_RL.stride(0)


def constants(q_THC: torch.Tensor, kv: PagedKv, tiling: Tiling) -> dict[str, int | bool]:
    return {
        "G": kv.num_kv_heads, "M": q_THC.shape[1] // kv.num_kv_heads, "B": kv.block, "C": kv.head_dim,
        "CP": padded_width(kv.head_dim), "TILE": tiling.columns, "SCALED": kv.scales_P2GB is not None,
        "num_warps": tiling.num_warps, "num_stages": tiling.num_stages,
    }  # fmt: skip
