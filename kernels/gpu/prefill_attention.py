"""Causal attention of chunks of prompts over their paged contexts, as a partial result.

The keys of a chunk are in the pages already. Token i of the N tokens of a chunk, at the end of a context of S tokens,
stands at position p = S - N + i and reads the positions up to its own (the last `window` of them, where there is one):
score_s = scale q.k_s, lse = log(sum_s exp(score_s)), out = sum_s exp(score_s - lse) v_s.

T tokens of all chunks, those of request r from starts[r] to starts[r + 1] - 1; R requests, H query heads, G key/value
heads, M = H/G, C head dimension, P pages, B tokens per page. A program computes ROWS rows of one request, token by
token the M query heads of one key/value head: so a tile of keys serves all heads that read it, and as few tokens as
possible lie across the diagonal.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.attention_tile import attend, constants, finish, operands
from kernels.gpu.paged_kv import PagedKv
from kernels.gpu.ragged_tiles import first_tile, num_tiles, request_of
from kernels.gpu.tiling import Tiling

TILINGS = {  # by the bytes of a number in the pages
    4: Tiling(rows=128, columns=32, num_warps=8, num_stages=3),
    2: Tiling(rows=128, columns=64, num_warps=8, num_stages=5),
    1: Tiling(rows=128, columns=64, num_warps=8, num_stages=5),
}


def reference(
    q_THC: torch.Tensor,
    kv: PagedKv,
    *,
    starts: torch.Tensor,
    lengths_R: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C], lse [T, H]) in float32."""
    out_THC, lse_TH = torch.zeros_like(q_THC, dtype=torch.float32), q_THC.new_empty(q_THC.shape[:2]).float()
    bounds = starts.tolist()
    for row, length in enumerate(lengths_R.tolist()):
        chunk = slice(bounds[row], bounds[row + 1])
        q_NGMC = q_THC[chunk].float().unflatten(1, (kv.num_kv_heads, -1))
        k_GSC, v_GSC = kv.context(row, length)
        scores_NGMS = scale * torch.einsum("ngmc,gsc->ngms", q_NGMC, k_GSC)
        position_N1 = torch.arange(length - len(q_NGMC), length, device=q_THC.device).unsqueeze(1)
        distance_NS = position_N1 - torch.arange(length, device=q_THC.device)
        hidden_NS = (distance_NS < 0) | (distance_NS >= (length + 1 if window is None else window))
        scores_NGMS.masked_fill_(hidden_NS[:, None, None], -torch.inf)
        lse_TH[chunk] = scores_NGMS.logsumexp(-1).flatten(1)
        out_THC[chunk] = torch.einsum("ngms,gsc->ngmc", scores_NGMS.softmax(-1), v_GSC).flatten(1, 2)
    return out_THC, lse_TH


@triton.jit(do_not_specialize=["stride_table", "num_requests", "window"])
def _kernel(
    q, stride_q, pages, scales, table, stride_table, starts, lengths, num_requests, window, scale, out, lse,
    G: tl.constexpr, M: tl.constexpr, B: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # The last tiles of a prompt read most and begin first.
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    request = request_of(starts, tile, num_requests, M, ROWS)
    start = tl.load(starts + request).to(tl.int32)
    num_tokens = tl.load(starts + request + 1).to(tl.int32) - start
    first_row = (tile - first_tile(starts, request, M, ROWS)) * ROWS
    if first_row >= num_tokens * M:
        return
    row_M = first_row + tl.arange(0, ROWS)
    exists_M = row_M < num_tokens * M
    c = tl.arange(0, CP)
    exists_MC = exists_M[:, None] & (c < C)[None, :]
    head_M = kv_head * M + row_M % M
    token_M = (start + row_M // M).to(tl.int64)
    q_MC = tl.load(q + (token_M * stride_q + head_M * C)[:, None] + c[None, :], mask=exists_MC, other=0.0)
    num_before = tl.load(lengths + request).to(tl.int32) - num_tokens
    sees_M = num_before + row_M // M + 1
    least = num_before + first_row // M + 1
    end = num_before + tl.minimum(num_tokens, (first_row + ROWS - 1) // M + 1)
    table += request.to(tl.int64) * stride_table
    top_M = tl.full([ROWS], -float("inf"), tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    acc_MC = tl.zeros([ROWS, CP], tl.float32)
    if HAS_WINDOW:
        whole = tl.maximum(0, least - window)
    else:
        whole = least // TILE * TILE
        top_M, total_M, acc_MC = attend(
            q_MC, top_M, total_M, acc_MC, sees_M, 0, whole, window, scale, pages, scales, table, kv_head,
            G, B, C, CP, TILE, False, False, SCALED,
        )  # fmt: skip
    top_M, total_M, acc_MC = attend(
        q_MC, top_M, total_M, acc_MC, sees_M, whole, end, window, scale, pages, scales, table, kv_head,
        G, B, C, CP, TILE, True, HAS_WINDOW, SCALED,
    )  # fmt: skip
    out_MC, lse_M = finish(top_M, total_M, acc_MC)
    place_M = token_M * (G * M) + head_M
    tl.store(lse + place_M, lse_M, mask=exists_M)
    tl.store(out + place_M[:, None] * C + c[None, :], out_MC.to(out.dtype.element_ty), mask=exists_MC)


def prefill_attention(
    q_THC: torch.Tensor,
    kv: PagedKv,
    *,
    starts: torch.Tensor,
    lengths_R: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C] in the dtype of q, lse [T, H] in float32); `lengths_R` counts the chunk itself."""
    num_tokens, num_heads, _ = q_THC.shape
    asked = operands(q_THC, kv)
    if len(starts) != len(lengths_R) + 1:
        raise ValueError(f"{len(lengths_R)} requests need one start more, got {len(starts)}")
    out_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
    lse_TH = q_THC.new_empty(num_tokens, num_heads, dtype=torch.float32)
    group, tiling = num_heads // kv.num_kv_heads, TILINGS[kv.pages_P2GBC.element_size()]
    if num_tokens:
        tiles = num_tiles(num_tokens * group, len(lengths_R), tile_rows=tiling.rows)
        _kernel[(tiles, kv.num_kv_heads)](
            *asked, starts, lengths_R, len(lengths_R), window or 0, scale, out_THC, lse_TH,
            ROWS=tiling.rows, HAS_WINDOW=window is not None, **constants(q_THC, kv, tiling),
        )  # fmt: skip
    return out_THC, lse_TH
