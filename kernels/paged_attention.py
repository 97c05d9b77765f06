"""Attention of single tokens over their paged contexts, as a partial result.

score_j = scale q.k_j for the context tokens j (the last `window` of them, where there is a window);
lse = log(sum_j exp(score_j)), out = sum_j exp(score_j - lse) v_j. Query head h reads key/value head h * G // H.
The tokens of a prompt are such rows too, each with its own context length, once their keys are in the pages.

T tokens, R requests, H query heads, G key/value heads, C head dimension, P pages, B tokens per page, L longest page
list. pages_P2GBC holds keys at index 0 and values at index 1; table_RL the int32 page ids of each request in order.
A work item is one key/value head of up to GROUP_TOKENS tokens that lie next to each other and have the same row, as
those of a prompt have: each page is read once for all their query heads, and asked for while the one before it is
computed (32 contexts of 192 tokens, two threads: 13 to 16 ms against 19 for 16 layers). What such tokens see of each
other's contexts counts as zero, so their row must be filled up to the longest.
"""

import numpy as np
import torch
from numba import carray, cfunc, float64, int32, int64, njit

from kernels.exponential import exponential
from kernels.team import TASK, Call, Program, Step, bind, claim, floats, pointer, words
from kernels.tile import (
    LANES,
    MAX_TILE_COLUMNS,
    TILE_ROWS,
    mix_1,
    mix_1_narrow,
    mix_2,
    mix_3,
    mix_4,
    prefetch,
    tile_1,
    tile_2,
    tile_3,
    tile_4,
)

_NO_WINDOW = 2**62
# 8 tokens after 4000, 8 layers of 8 heads of 64 on one core (Xeon, AVX-512): 23 ms, in fours 34, one by one 73.
GROUP_TOKENS = 8


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
        for j in range(0, 16, TILE_ROWS):
            k_j, out = keys + 4 * j * width, place + 4 * j
            if columns == 4:
                tile_4(k_j, width, q_m, width, width, out, 1, stride, k_j, 0)
            elif columns == 3:
                tile_3(k_j, width, q_m, width, width, out, 1, stride, k_j, 0)
            elif columns == 2:
                tile_2(k_j, width, q_m, width, width, out, 1, stride, k_j, 0)
            else:
                tile_1(k_j, width, q_m, width, width, out, 1, stride, k_j, 0)


@njit("void(int64, int64, int64, int64, int64, int64, int64)", cache=True, nogil=True)
def _add_values(weights, values, out, num_rows, num_queries, width, stride):
    """out_m += sum_j weights[m, j] v_j for the `num_rows` tokens at `values`."""
    whole = width - width % LANES
    for m in range(0, num_queries, 4):
        columns = min(4, num_queries - m)
        p, out_m = weights + 4 * m * stride, out + 4 * m * width
        for c in range(0, whole, LANES):
            v, place = values + 4 * c, out_m + 4 * c
            if columns == 4:
                mix_4(p, stride, v, width, num_rows, place, width)
            elif columns == 3:
                mix_3(p, stride, v, width, num_rows, place, width)
            elif columns == 2:
                mix_2(p, stride, v, width, num_rows, place, width)
            else:
                mix_1(p, stride, v, width, num_rows, place, width)
        for c in range(whole, width):
            for column in range(columns):
                place = out_m + 4 * (column * width + c)
                mix_1_narrow(p + 4 * column * stride, stride, values + 4 * c, width, num_rows, place, width)


@njit("float32(float32[::1], float32)", cache=True, nogil=True, fastmath=True, error_model="numpy")
def _softmax(scores_S, scale):
    """Scores to weights that sum to one, in place; returns their lse."""
    top = scores_S[0]
    for j in range(len(scores_S)):
        top = max(top, scores_S[j])
    total = np.float32(0.0)
    for j in range(len(scores_S)):
        scores_S[j] = exponential((scores_S[j] - top) * scale)
        total += scores_S[j]
    inverse = np.float32(1.0) / total
    for j in range(len(scores_S)):
        scores_S[j] *= inverse
    return top * scale + np.log(total)


@njit("int64(int64[::1], int64, int64)", cache=True, nogil=True)
def _part(a, page, number):
    """The address of the keys of head `number`; from G on, of the values of head `number` - G."""
    num_kv_heads, width, block = a[9], a[11], a[12]
    return a[6] + 4 * width * block * (page * 2 * num_kv_heads + number)


@njit("int64(int64[::1], int64, int64)", cache=True, nogil=True)
def _group_size(rows_T, token, num_tokens):
    """How many tokens are attended together from this one on; 0: it belongs to a group that begins before it."""
    row, num_before, size = rows_T[token], 0, 1
    while num_before < token and rows_T[token - num_before - 1] == row:
        num_before += 1
    if num_before % GROUP_TOKENS:
        return 0
    while size < GROUP_TOKENS and token + size < num_tokens and rows_T[token + size] == row:
        size += 1
    return size


@njit("void(int64[::1], float64, int64, int64, int64)", cache=True, nogil=True)
def _attend(a, scale, token, num_tokens, kv_head):
    num_kv_heads, num_queries, width, block = a[9], a[10], a[11], a[12]
    step = words(a[1], 7)
    row, lengths_T = words(step[3], token + 1)[token], words(step[4], token + num_tokens)[token:]
    table_L = carray(pointer(step[5] + 4 * row * step[6]), (step[6],), int32)
    length, first = np.max(lengths_T), max(0, np.min(lengths_T) - a[7])
    first_page, stop_page = first // block, (length + block - 1) // block
    stride = (stop_page - first_page) * block
    num_columns, num_floats = num_tokens * num_queries, num_queries * width
    q_NX = np.empty((num_tokens, num_floats), dtype=np.float32)
    for n in range(num_tokens):
        q_NX[n] = floats(a[2] + 4 * ((token + n) * a[3] + kv_head * num_floats), num_floats)
    scores = np.empty(num_columns * stride, dtype=np.float32)
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
            lse = _softmax(row_S[start:stop], np.float32(scale))
        row_S[:start] = 0
        row_S[stop:] = 0
        floats(a[5] + 4 * (((token + n) * num_kv_heads + kv_head) * num_queries + m % num_queries), 1)[0] = (
            lse
        )
    out_NX = np.zeros((num_tokens, num_floats), dtype=np.float32)
    for p in range(first_page, stop_page):
        start, stop = max(first, p * block), min(length, (p + 1) * block)
        if p + 1 < stop_page:
            prefetch(_part(a, table_L[p + 1], num_kv_heads + kv_head), 4 * width * block)
        values = _part(a, table_L[p], num_kv_heads + kv_head) + 4 * width * (start - p * block)
        weights = scores.ctypes.data + 4 * (start - first_page * block)
        _add_values(weights, values, out_NX.ctypes.data, stop - start, num_columns, width, stride)
    for n in range(num_tokens):
        floats(a[4] + 4 * ((token + n) * num_kv_heads + kv_head) * num_floats, num_floats)[:] = out_NX[n]


@cfunc(TASK, cache=True)
def _task(data):
    a = carray(
        data, (13,), int64
    )  # counter, step, q, stride of q, out, lse, pages, window, scale, G, M, C, B
    scale, num_tokens = carray(data, (13,), float64)[8], words(a[1], 1)[0]
    rows_T = words(words(a[1], 7)[3], num_tokens)
    while True:
        item = claim(data)
        if item >= num_tokens * a[9]:
            return
        token = item // a[9]
        size = _group_size(rows_T, token, num_tokens)
        if size:
            _attend(a, scale, token, size, item % a[9])


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
    if block != 16 or not pages_P2GBC.is_contiguous():
        raise ValueError(f"pages must be contiguous and hold 16 tokens, got {list(pages_P2GBC.shape)}")
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
