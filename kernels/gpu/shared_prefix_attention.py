"""Attention of single tokens over a prefix that many of them share and then a context of their own.

The prefix is read once for all tokens that share it, as a product of matrices, instead of once for each: out and lse of
prefix and own context are partial results over disjoint keys, merged exactly (Zhu et al., "RelayAttention", 2024).

T tokens, H query heads, G key/value heads, M = H/G, C head dimension, N groups of tokens, I partial results. The tokens
of group n are those from starts[n] to starts[n + 1] - 1; its prefix is row n of the prefixes' table, of
prefix_lengths_N[n] tokens or none. A program computes ROWS rows of one group (its tokens times the M heads of a
key/value head) over one run of SPAN tokens of the prefix: of fixed length, so that a token does not depend on those
beside it. Shorter than that of `paged_attention`, because there are fewer rows to share out: 32 tokens after a prefix
of 2,048, with H = 32 and G = 8, are 128 programs, and a Hopper has 132 processors.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu import paged_attention
from kernels.gpu.attention_tile import attend, constants, finish, operands
from kernels.gpu.merge_partials import merge_partials
from kernels.gpu.paged_kv import PagedKv
from kernels.gpu.ragged_tiles import first_tile, num_tiles, request_of
from kernels.gpu.tiling import Tiling

SPAN = 256
TILINGS = {  # by the bytes of a number in the pages
    4: Tiling(rows=64, columns=32, num_warps=4, num_stages=3),
    2: Tiling(rows=64, columns=64, num_warps=4, num_stages=3),
    1: Tiling(rows=64, columns=32, num_warps=4, num_stages=5),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefixes:
    kv: PagedKv  # the prefix of group n is row n
    prefix_lengths_N: torch.Tensor
    starts: torch.Tensor  # N + 1 of them: every token is of a group


def reference(
    q_THC: torch.Tensor,
    prefixes: Prefixes,
    kv: PagedKv,
    *,
    rows_T: torch.Tensor,
    lengths_T: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C], lse [T, H]) in float32, over prefix and own context as one."""
    out_THC, lse_TH = torch.zeros_like(q_THC, dtype=torch.float32), q_THC.new_empty(q_THC.shape[:2]).float()
    starts = prefixes.starts.tolist()
    for group, prefix_length in enumerate(prefixes.prefix_lengths_N.tolist()):
        for t in range(starts[group], starts[group + 1]):
            contexts = (
                prefixes.kv.context(group, prefix_length),
                kv.context(int(rows_T[t]), int(lengths_T[t])),
            )
            k_GSC, v_GSC = (torch.cat(parts, dim=1) for parts in zip(*contexts, strict=True))
            scores_GMS = scale * q_THC[t].float().view(len(k_GSC), -1, kv.head_dim) @ k_GSC.transpose(1, 2)
            lse_TH[t] = scores_GMS.logsumexp(-1).flatten()
            out_THC[t] = (scores_GMS.softmax(-1) @ v_GSC).view(-1, kv.head_dim)
    return out_THC, lse_TH


@triton.jit(do_not_specialize=["stride_table", "num_groups", "num_all"])
def _kernel(
    q, stride_q, pages, scales, table, stride_table, starts, lengths, num_groups, scale, out, lse, num_all,
    G: tl.constexpr, M: tl.constexpr, B: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    ROWS: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0) // G, tl.program_id(0) % G
    run = tl.program_id(1)
    group = request_of(starts, tile, num_groups, M, ROWS)
    start = tl.load(starts + group).to(tl.int32)
    num_rows = (tl.load(starts + group + 1).to(tl.int32) - start) * M
    row_M = (tile - first_tile(starts, group, M, ROWS)) * ROWS + tl.arange(0, ROWS)
    exists_M = row_M < num_rows
    head_M = kv_head * M + row_M % M
    token_M = (start + row_M // M).to(tl.int64)
    place_M = (run.to(tl.int64) * num_all + token_M) * (G * M) + head_M
    begin, end = run * RUN, tl.minimum(tl.load(lengths + group).to(tl.int32), (run + 1) * RUN)
    if begin >= end:
        tl.store(lse + place_M, tl.full([ROWS], -float("inf"), tl.float32), mask=exists_M)
        return
    c = tl.arange(0, CP)
    exists_MC = exists_M[:, None] & (c < C)[None, :]
    q_MC = tl.load(q + (token_M * stride_q + head_M * C)[:, None] + c[None, :], mask=exists_MC, other=0.0)
    table += group.to(tl.int64) * stride_table
    top_M = tl.full([ROWS], -float("inf"), tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    acc_MC = tl.zeros([ROWS, CP], tl.float32)
    sees_M = tl.full([ROWS], 0, tl.int32) + end
    whole = begin + (end - begin) // TILE * TILE
    top_M, total_M, acc_MC = attend(
        q_MC, top_M, total_M, acc_MC, sees_M, begin, whole, 0, scale, pages, scales, table, kv_head,
        G, B, C, CP, TILE, False, False, SCALED,
    )  # fmt: skip
    top_M, total_M, acc_MC = attend(
        q_MC, top_M, total_M, acc_MC, sees_M, whole, end, 0, scale, pages, scales, table, kv_head,
        G, B, C, CP, TILE, True, False, SCALED,
    )  # fmt: skip
    out_MC, lse_M = finish(top_M, total_M, acc_MC)
    tl.store(lse + place_M, lse_M, mask=exists_M)
    tl.store(out + place_M[:, None] * C + c[None, :], out_MC, mask=exists_MC)


def shared_prefix_attention(
    q_THC: torch.Tensor,
    prefixes: Prefixes,
    kv: PagedKv,
    *,
    rows_T: torch.Tensor,
    lengths_T: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C] in the dtype of q, lse [T, H] in float32); `kv`, `rows_T` and `lengths_T` are the own contexts."""
    num_tokens, num_heads, _ = q_THC.shape
    num_groups = len(prefixes.prefix_lengths_N)
    if len(prefixes.starts) != num_groups + 1:
        raise ValueError(f"{num_groups} groups need one start more, got {len(prefixes.starts)}")
    if prefixes.kv.pages_P2GBC.shape[1:] != kv.pages_P2GBC.shape[1:]:
        got, wanted = prefixes.kv.pages_P2GBC.shape[1:], kv.pages_P2GBC.shape[1:]
        raise ValueError(f"pages of prefixes are {list(got)}, of contexts {list(wanted)}")
    num_shared = triton.cdiv(prefixes.kv.max_tokens, SPAN)
    num_partials = num_shared + triton.cdiv(kv.max_tokens, paged_attention.SPAN)
    out_ITHC = q_THC.new_empty(num_partials, *q_THC.shape, dtype=torch.float32)
    lse_ITH = q_THC.new_empty(num_partials, num_tokens, num_heads, dtype=torch.float32)
    group, shared = num_heads // kv.num_kv_heads, prefixes.kv
    tiling = TILINGS[shared.pages_P2GBC.element_size()]
    paged_attention.launch(
        q_THC, kv, rows_T=rows_T, lengths_T=lengths_T, window=None, scale=scale,
        partials=(out_ITHC[num_shared:], lse_ITH[num_shared:]),
    )  # fmt: skip
    if num_tokens:
        tiles = num_tiles(num_tokens * group, num_groups, tile_rows=tiling.rows)
        _kernel[(tiles * kv.num_kv_heads, num_shared)](
            *operands(q_THC, shared), prefixes.starts, prefixes.prefix_lengths_N, num_groups, scale, out_ITHC,
            lse_ITH, num_tokens, ROWS=tiling.rows, RUN=SPAN, **constants(q_THC, shared, tiling),
        )  # fmt: skip
    return merge_partials(out_ITHC, lse_ITH, dtype=q_THC.dtype)
