"""Attention of single tokens over their paged contexts, as a partial result: split-K, for decoding.

score_s = scale q.k_s for the context tokens s (the last `window` of them, where there is a window);
lse = log(sum_s exp(score_s)), out = sum_s exp(score_s - lse) v_s. Query head h reads key/value head h * G // H.

T tokens, R requests, H query heads, G key/value heads, M = H/G, C head dimension, P pages, B tokens per page,
L longest page list, I partial results. A program computes one run of SPAN context tokens for one token and the M query
heads of one key/value head, which share a tile of the tensor cores; `merge_partials` does the rest.

The runs have a fixed length, and there are not just as many as the device has room for: so what a token gives does not
depend on the tokens beside it. Their partial results cost little: 1.6 % of the bytes of a context in bfloat16 with
M = 4. There are as many runs as a row of the table has room for: pass a table as wide as the longest context.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.attention_tile import attend, constants, finish, operands
from kernels.gpu.merge_partials import merge_partials
from kernels.gpu.paged_kv import PagedKv
from kernels.gpu.tiling import Tiling

SPAN = 512
TILINGS = {  # by the bytes of a number in the pages
    4: Tiling(rows=16, columns=32, num_warps=4, num_stages=3),
    2: Tiling(rows=16, columns=64, num_warps=4, num_stages=3),
    1: Tiling(rows=16, columns=64, num_warps=4, num_stages=5),
}


def reference(
    q_THC: torch.Tensor,
    kv: PagedKv,
    *,
    rows_T: torch.Tensor,
    lengths_T: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C], lse [T, H]) in float32; a context of length 0 gives 0 and -inf."""
    out_THC, lse_TH = torch.zeros_like(q_THC, dtype=torch.float32), q_THC.new_empty(q_THC.shape[:2]).float()
    for token, (row, length) in enumerate(zip(rows_T.tolist(), lengths_T.tolist(), strict=True)):
        first = 0 if window is None else max(0, length - window)
        k_GSC, v_GSC = (x_GSC[:, first:] for x_GSC in kv.context(row, length))
        q_GMC = q_THC[token].float().view(kv.num_kv_heads, -1, kv.head_dim)
        scores_GMS = scale * q_GMC @ k_GSC.transpose(1, 2)
        lse_TH[token] = scores_GMS.logsumexp(-1).flatten()
        out_THC[token] = (scores_GMS.softmax(-1) @ v_GSC).view(-1, kv.head_dim)
    return out_THC, lse_TH


@triton.jit(do_not_specialize=["stride_table", "window", "num_tokens"])
def _kernel(
    q, stride_q, pages, scales, table, stride_table, rows, lengths, window, scale, out, lse, num_tokens,
    G: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, B: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    RUN: tl.constexpr, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # The heads of a page lie side by side: programs that run at the same time read them together.
    kv_head, token = tl.program_id(0) % G, tl.program_id(0) // G
    run = tl.program_id(1)
    length = tl.load(lengths + token).to(tl.int32)
    begin, end = run * RUN, tl.minimum(length, (run + 1) * RUN)
    if HAS_WINDOW:
        begin = tl.maximum(begin, length - window)
    m = tl.arange(0, MP)
    c = tl.arange(0, CP)
    head_M = kv_head * M + m
    exists_MC = (m < M)[:, None] & (c < C)[None, :]
    place_M = (run * num_tokens + token).to(tl.int64) * (G * M) + head_M
    top_M = tl.full([MP], -float("inf"), tl.float32)
    total_M = tl.zeros([MP], tl.float32)
    acc_MC = tl.zeros([MP, CP], tl.float32)
    if begin < end:
        q_MC = tl.load(
            q + token.to(tl.int64) * stride_q + head_M[:, None] * C + c[None, :], mask=exists_MC, other=0.0
        )
        table += tl.load(rows + token).to(tl.int64) * stride_table
        sees_M = tl.full([MP], 0, tl.int32) + end
        whole = begin + (end - begin) // TILE * TILE
        top_M, total_M, acc_MC = attend(
            q_MC, top_M, total_M, acc_MC, sees_M, begin, whole, window, scale, pages, scales, table, kv_head,
            G, B, C, CP, TILE, False, False, SCALED,
        )  # fmt: skip
        top_M, total_M, acc_MC = attend(
            q_MC, top_M, total_M, acc_MC, sees_M, whole, end, window, scale, pages, scales, table, kv_head,
            G, B, C, CP, TILE, True, False, SCALED,
        )  # fmt: skip
    out_MC, lse_M = finish(top_M, total_M, acc_MC)
    tl.store(lse + place_M, lse_M, mask=m < M)
    # Nobody reads what an empty run gives, unless it is the only one.
    if (begin < end) or (run == 0):
        place_MC = out + place_M[:, None] * C + c[None, :]
        tl.store(place_MC, out_MC.to(out.dtype.element_ty), mask=exists_MC)


def paged_attention(
    q_THC: torch.Tensor,
    kv: PagedKv,
    *,
    rows_T: torch.Tensor,
    lengths_T: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C] in the dtype of q, lse [T, H] in float32); a context of length 0 gives 0 and -inf."""
    num_runs = triton.cdiv(kv.max_tokens, SPAN)
    dtype = q_THC.dtype if num_runs == 1 else torch.float32
    out_ITHC = q_THC.new_empty(num_runs, *q_THC.shape, dtype=dtype)
    lse_ITH = q_THC.new_empty(num_runs, *q_THC.shape[:2], dtype=torch.float32)
    launch(
        q_THC,
        kv,
        rows_T=rows_T,
        lengths_T=lengths_T,
        window=window,
        scale=scale,
        partials=(out_ITHC, lse_ITH),
    )
    if num_runs == 1:
        return out_ITHC[0], lse_ITH[0]
    return merge_partials(out_ITHC, lse_ITH, dtype=q_THC.dtype)


def launch(
    q_THC: torch.Tensor,
    kv: PagedKv,
    *,
    rows_T: torch.Tensor,
    lengths_T: torch.Tensor,
    window: int | None,
    scale: float,
    partials: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Fills one partial result for each run of SPAN tokens; of an empty run but the first only its lse."""
    num_tokens, num_heads, _ = q_THC.shape
    asked = operands(q_THC, kv)
    if rows_T.shape != (num_tokens,) or lengths_T.shape != (num_tokens,):
        raise ValueError(f"{num_tokens} tokens, but {len(rows_T)} rows and {len(lengths_T)} lengths")
    out_ITHC, lse_ITH = partials
    group, tiling = num_heads // kv.num_kv_heads, TILINGS[kv.pages_P2GBC.element_size()]
    if num_tokens:
        _kernel[(num_tokens * kv.num_kv_heads, len(lse_ITH))](
            *asked, rows_T, lengths_T, window or 0, scale, out_ITHC, lse_ITH, num_tokens,
            MP=max(tiling.rows, triton.next_power_of_2(group)), RUN=SPAN, HAS_WINDOW=window is not None,
            **constants(q_THC, kv, tiling),
        )  # fmt: skip
