"""Attention of single tokens over their paged contexts, as a partial result.

score_j = scale q.k_j for the context tokens j (the last `window` of them, where there is a window);
lse = log(sum_j exp(score_j)), out = sum_j exp(score_j - lse) v_j. Query head h reads key/value head h * G // H.
The tokens of a prompt are such rows too, each with its own context length, once their keys are in the pages.

T tokens, R requests, H query heads, G key/value heads, C head dimension, P pages, B tokens per page, L longest page
list. pages_P2GBC holds keys at index 0 and values at index 1; table_RL the int32 page ids of each request in order.
A work item is one key/value head of a group: tokens that lie next to each other and have the same row, as those of a
prompt have. Each page is read once for all query heads of a group, and asked for while the one before it is computed
(32 contexts of 192 tokens, two threads: 13 to 16 ms against 19 for 16 layers). What such tokens see of each other's
contexts counts as zero, so their row must be filled up to the longest.

A token comes out the same to the last bit in any group: its sums have an order of their own (`kernels.tile`), and zeros
change none (of finite values: KV that is not is refused where it comes in). Chunks of prompts therefore run here too,
not as torch's flash attention: one core of a Xeon with AVX-512, 16 heads of 64, 512 tokens alone 7.6 against 9.4 ms,
after 3,584 others 95 against 78 (bench.kernels).
"""

import numpy as np
import torch
from numba import carray, cfunc, float64, int32, int64, njit

from kernels.softmax_row import softmax_row
from kernels.team import TASK, Call, Program, Step, bind, claim, floats, pointer, words
from kernels.tile import (
    LANES,
    MAX_TILE_COLUMNS,
    MIX_COLUMNS,
    TILE_ROWS,
    mix,
    mix_narrow,
    mix_wide,
    prefetch,
    tile,
)

_NO_WINDOW = 2**62
_BLOCK = 16  # tokens of a page
# Of a group, in queries and scores: the more, the fewer times pages are read; all its scores (1 MiB) stay in L2.
_GROUP_COLUMNS, _GROUP_SCORES = 32, 2**18


def reference(
    q_THC: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    *,
    table_RL: torch.Tensor,
    rows_T: torch.Tensor,
    lengths_T: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C] in the dtype of q, lse [T, H] in fp32); a context of length 0 gives 0 and -inf."""
    num_tokens, num_heads, head_dim = q_THC.shape
    _, _, num_kv_heads, block, _ = pages_P2GBC.shape
    out_THC, lse_TH = torch.zeros_like(q_THC), torch.full((num_tokens, num_heads), -torch.inf)
    for token, (row, length) in enumerate(zip(rows_T.tolist(), lengths_T.tolist(), strict=True)):
        if length == 0:
            continue
        pages = pages_P2GBC[table_RL[row, : -(-length // block)].long()].float()
        k_GSC, v_GSC = pages.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :length]
        if window is not None:
            k_GSC, v_GSC = k_GSC[:, -window:], v_GSC[:, -window:]
        q_GMC = q_THC[token].float().view(num_kv_heads, -1, head_dim)
        scores_GMS = scale * q_GMC @ k_GSC.transpose(1, 2)
        lse_TH[token] = scores_GMS.logsumexp(-1).flatten()
        out_THC[token] = (scores_GMS.softmax(-1) @ v_GSC).reshape(num_heads, head_dim).to(q_THC.dtype)
    return out_THC, lse_TH


@njit("void(int64, int64, int64, int64, int64, int64)", cache=True, nogil=True)
def _page_scores(q, keys, scores, num_queries, width, stride):
    """scores[m, j] = q_m.k_j for the B tokens of a page; `scores` is the address of the page's first column."""
    for m in range(0, num_queries, MAX_TILE_COLUMNS):
        columns = min(MAX_TILE_COLUMNS, num_queries - m)
        q_m, place = q + 4 * m * width, scores + 4 * m * stride
        for j in range(0, _BLOCK, TILE_ROWS):
            k_j, out = keys + 4 * j * width, place + 4 * j
            tile(columns, k_j, width, q_m, width, width, out, stride)


@njit("void(int64, int64, int64, int64, int64, int64, int64)", cache=True, nogil=True)
def _add_values(weights, values, out, num_rows, num_queries, width, stride):
    """out_m += sum_j weights[m, j] v_j for the `num_rows` tokens at `values`."""
    whole = width - width % LANES
    for m in range(0, num_queries, MIX_COLUMNS):
        columns = min(MIX_COLUMNS, num_queries - m)
        p, out_m = weights + 4 * m * stride, out + 4 * m * width
        c = 0
        while c < whole:
            v, place = values + 4 * c, out_m + 4 * c
            if c + 2 * LANES <= whole:
                mix_wide(columns, p, stride, v, width, num_rows, place, width)
                c += 2 * LANES
            else:
                mix(columns, p, stride, v, width, num_rows, place, width)
                c += LANES
        for c in range(whole, width):
            mix_narrow(columns, p, stride, values + 4 * c, width, num_rows, out_m + 4 * c, width)


@njit("int64(int64[::1], int64, int64)", cache=True, nogil=True)
def _part(a, page, number):
    """The address of the keys of head `number`; from G on, of the values of head `number` - G."""
    num_kv_heads, width, block = a[9], a[11], a[12]
    return a[6] + 4 * width * block * (page * 2 * num_kv_heads + number)


@njit("int64[::1](int64[::1], int64[::1], int64)", cache=True, nogil=True)
def _group_starts(rows_T, lengths_T, num_queries):
    """The first token of each group, and the number of tokens at the end."""
    num_tokens = len(rows_T)
    starts, num_groups, longest = np.empty(num_tokens + 1, dtype=np.int64), 0, 0
    for token in range(num_tokens):
        size = token - starts[num_groups - 1] if num_groups else 0
        longest = max(longest, lengths_T[token])
        columns = (size + 1) * num_queries
        if (
            size == 0
            or rows_T[token] != rows_T[token - 1]
            or columns > _GROUP_COLUMNS
            or columns * longest > _GROUP_SCORES
        ):
            starts[num_groups] = token
            num_groups += 1
            longest = lengths_T[token]
    starts[num_groups] = num_tokens
    return starts[: num_groups + 1]


@njit("void(int64[::1], float64, int64, int64, int64)", cache=True, nogil=True)
def _attend(a, scale, token, num_tokens, kv_head):
    num_kv_heads, num_queries, width, block = a[9], a[10], a[11], a[12]
    step = words(a[1], 7)
    row, lengths_T = words(step[3], token + 1)[token], words(step[4], token + num_tokens)[token:]
    table_L = carray(pointer(step[5] + 4 * row * step[6]), (step[6],), int32)
    length, first = np.max(lengths_T), max(0, np.min(lengths_T) - a[7])
    first_page, stop_page = first // block, (length + block - 1) // block
    # An odd number of cache lines: rows a power of two apart would share the same few places of the cache.
    stride = ((stop_page - first_page) | 1) * block
    num_columns, num_floats = num_tokens * num_queries, num_queries * width
    q_NX = np.empty((num_tokens, num_floats), dtype=np.float32)
    for n in range(num_tokens):
        q_NX[n] = floats(a[2] + 4 * ((token + n) * a[3] + kv_head * num_floats), num_floats)
    scores = np.empty(num_columns * stride, dtype=np.float32)
    inverse_M, totals = np.zeros(num_columns, dtype=np.float32), np.empty(2, dtype=np.float32)
    # Its address is taken where it is used: memory goes when its array is not named any more.
    for p in range(first_page, stop_page):
        if p + 1 < stop_page:
            prefetch(_part(a, table_L[p + 1], kv_head), 4 * width * block)
        keys = _part(a, table_L[p], kv_head)
        place = scores.ctypes.data + 4 * (p - first_page) * block
        _page_scores(q_NX.ctypes.data, keys, place, num_columns, width, stride)
    for m in range(num_columns):
        n = m // num_queries
        row_S = scores[m * stride : (m + 1) * stride]
        start, stop = max(0, lengths_T[n] - a[7]) - first_page * block, lengths_T[n] - first_page * block
        lse = np.float32(-np.inf)
        if lengths_T[n] > 0:
            softmax_row(row_S.ctypes.data + 4 * start, stop - start, np.float32(scale), totals.ctypes.data)
            inverse_M[m], lse = np.float32(1.0) / totals[1], totals[0] * np.float32(scale) + np.log(totals[1])
        row_S[:start] = 0
        row_S[stop:] = 0
        floats(a[5] + 4 * (((token + n) * num_kv_heads + kv_head) * num_queries + m % num_queries), 1)[0] = (
            lse
        )
    out_MC = np.zeros((num_columns, width), dtype=np.float32)
    for p in range(first_page, stop_page):
        start, stop = max(first, p * block), min(length, (p + 1) * block)
        if p + 1 < stop_page:
            prefetch(_part(a, table_L[p + 1], num_kv_heads + kv_head), 4 * width * block)
        values = _part(a, table_L[p], num_kv_heads + kv_head) + 4 * width * (start - p * block)
        weights = scores.ctypes.data + 4 * (start - first_page * block)
        _add_values(weights, values, out_MC.ctypes.data, stop - start, num_columns, width, stride)
    for m in range(num_columns):
        head = ((token + m // num_queries) * num_kv_heads + kv_head) * num_queries + m % num_queries
        floats(a[4] + 4 * head * width, width)[:] = out_MC[m] * inverse_M[m]


@cfunc(TASK, cache=True)
def _task(data):
    a = carray(
        data, (13,), int64
    )  # counter, step, q, stride of q, out, lse, pages, window, scale, G, M, C, B
    scale, num_tokens, step = carray(data, (13,), float64)[8], words(a[1], 1)[0], words(a[1], 7)
    # Every thread finds the groups for itself: a microsecond for 512 tokens.
    starts = _group_starts(words(step[3], num_tokens), words(step[4], num_tokens), a[10])
    while True:
        item = claim(data)
        group = item // a[9]
        if group >= len(starts) - 1:
            return
        _attend(a, scale, starts[group], starts[group + 1] - starts[group], item % a[9])


def paged_attention_call(
    step: Step,
    q_TN: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    *,
    window: int | None,
    scale: float,
    out_TX: torch.Tensor,
    lse_TH: torch.Tensor,
) -> Call:
    """Queries are the first H C channels of `q_TN`, out_TX is [T, H C]. Reads rows, lengths and table of the step."""
    _, _, num_kv_heads, block, head_dim = pages_P2GBC.shape
    if block != _BLOCK or not pages_P2GBC.is_contiguous():
        raise ValueError(f"pages must be contiguous and hold {_BLOCK} tokens, got {list(pages_P2GBC.shape)}")
    group = lse_TH.shape[1] // num_kv_heads
    sizes = (num_kv_heads, group, head_dim, block)
    tokens = _NO_WINDOW if window is None else window
    arguments = (q_TN, q_TN.stride(0), out_TX, lse_TH, pages_P2GBC, tokens, float(scale), *sizes)
    return bind(_task.address, step, *arguments)


def paged_attention(
    q_THC: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    *,
    table_RL: torch.Tensor,
    rows_T: torch.Tensor,
    lengths_T: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C], lse [T, H] in fp32)."""
    if q_THC.dtype != torch.float32:
        return reference(
            q_THC,
            pages_P2GBC,
            table_RL=table_RL,
            rows_T=rows_T,
            lengths_T=lengths_T,
            window=window,
            scale=scale,
        )
    num_tokens, num_heads, head_dim = q_THC.shape
    if q_THC.stride()[1:] != (head_dim, 1):
        raise ValueError(f"the heads of a query must be contiguous, got strides {q_THC.stride()}")
    out_TX, lse_TH = q_THC.new_empty(num_tokens, num_heads * head_dim), q_THC.new_empty(num_tokens, num_heads)
    step = Step()
    step.fill(num_tokens, rows_T=rows_T, lengths_T=lengths_T, table_RL=table_RL)
    q_TN = q_THC.flatten(1)
    Program([
        paged_attention_call(
            step, q_TN, pages_P2GBC, window=window, scale=scale, out_TX=out_TX, lse_TH=lse_TH
        )
    ]).run()  # fmt: skip
    return out_TX.view(num_tokens, num_heads, head_dim), lse_TH
