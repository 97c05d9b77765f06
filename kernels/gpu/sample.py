"""One token per row of logits: greedy, or a draw from the filtered distribution.

logits z [R, V]. Row by row, with temperature t, top_k k, top_p q, min_p m and a uniform number u in [0, 1):

    t = 0:     the token of the largest z; the lowest id among equals
               so is a row with NaN, with infinity or with nothing but -infinity, though which token is as good as any
    otherwise: w_i = exp((z_i - max z) / t); tokens ranked by z, largest first, lowest id first among equals
               keep the first k                                   (0 < k < V)
               keep i while sum of w before i < q * sum of all w  (q < 1; of what top_k kept; always the first)
               keep i while w_i >= m                              (m > 0)
               draw the kept token with the lowest id at which the sum of kept w, by id, exceeds u * their total

Nothing is sorted. A float's bits, with the sign turned about, are a whole number in the same order; the lowest number
that is kept is found eight ways at a time, three bits in a pass over the row, by how many tokens (top_k) or how much
weight (top_p) lie at and above each of eight candidates. Of the tokens that equal it the first by id are kept.

Weights are float32, their sums float64 in an order that the rows beside do not change. Beside `kernels.sample`, whose
weights are float64 too, about one draw in a million may fall to a neighbour.

R rows, V vocabulary. One program a row: the 11 passes of a search read it from the cache.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TOKENS, _WARPS = 1024, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """How to choose, one entry per row. `uniform` is used where `temperature` > 0."""

    temperature: torch.Tensor  # float32 [R], 0 is greedy
    top_k: torch.Tensor  # int64 [R], 0 keeps all
    top_p: torch.Tensor  # float64 [R], 1 keeps all
    min_p: torch.Tensor  # float64 [R], 0 keeps all
    uniform: torch.Tensor  # float64 [R]


def reference(logits_RV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The formulas, word for word: sorts every row."""
    tokens = [_reference_row(z_V, draws, row) for row, z_V in enumerate(logits_RV)]
    return torch.tensor(tokens, dtype=torch.int64)


def _reference_row(z_V: torch.Tensor, draws: Draws, row: int) -> int:
    temperature, top_k, top_p, min_p, uniform = (
        x[row].item() for x in (draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.uniform)
    )
    if temperature == 0:
        return int(z_V.argmax())
    ranked_V, token_V = z_V.double().sort(descending=True, stable=True)
    w_V = ((ranked_V - ranked_V[0]) / temperature).exp()
    num_kept = int(top_k) if 0 < top_k < len(z_V) else len(z_V)
    if top_p < 1:
        w = w_V[:num_kept]
        num_kept = max(1, int((w.cumsum(0) - w < top_p * w.sum()).sum()))
    num_kept = int((w_V[:num_kept] >= min_p).sum())
    kept_V, order_V = token_V[:num_kept].sort()
    cumulative_V = w_V[order_V].cumsum(0)
    return int(kept_V[(cumulative_V > uniform * cumulative_V[-1]).nonzero()[0, 0]])


@triton.jit
def _load(row, first, top, temperature, V: tl.constexpr, TOKENS: tl.constexpr):
    """(ids, keys in the order of the logits, weights) of a run; what lies behind the end weighs nothing."""
    i = first + tl.arange(0, TOKENS)
    z = tl.load(row + i, mask=i < V, other=-float("inf")).to(tl.float32)
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)  # 0 and -0 are equals
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    # Subtracted before it is divided: a tiny temperature may then give -inf, whose weight is 0, but never inf.
    return i, key, tl.exp((z - top) / temperature)


@triton.jit
def _weight_of(key, top, temperature):
    bits = (key - 2147483648).to(tl.int32)
    z = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    return tl.exp((z - top) / temperature).to(tl.float64)


@triton.jit
def _lowest_kept(row, target, top, temperature, V: tl.constexpr, TOKENS: tl.constexpr, COUNTS: tl.constexpr):
    """The largest key at and above which there are `target` tokens (COUNTS), or as much weight."""
    candidate_8 = tl.arange(0, 8).to(tl.int64)
    key_so_far = tl.full([], 0, tl.int64)
    for step in range(11):
        shift = 30 - 3 * step
        edge_8 = key_so_far + (candidate_8 << shift)
        sum_V8 = tl.zeros([TOKENS, 8], tl.float64)
        for first in range(0, V, TOKENS):
            i, key, weight = _load(row, first, top, temperature, V, TOKENS)
            amount = (tl.where(i < V, 1.0, 0.0) if COUNTS else weight).to(tl.float64)
            sum_V8 += tl.where(key[:, None] >= edge_8[None, :], amount[:, None], 0.0)
        reaches_8 = tl.sum(sum_V8, 0) >= target
        key_so_far += tl.max(tl.where(reaches_8, candidate_8, 0), 0) << shift
    return key_so_far


@triton.jit
def _above(row, key_edge, top, temperature, V: tl.constexpr, TOKENS: tl.constexpr):
    """How many tokens rank before all those with this key, and what they weigh."""
    count_V, weight_V = tl.zeros([TOKENS], tl.float64), tl.zeros([TOKENS], tl.float64)
    for first in range(0, V, TOKENS):
        i, key, weight = _load(row, first, top, temperature, V, TOKENS)
        is_above = (key > key_edge) & (i < V)
        count_V += tl.where(is_above, 1.0, 0.0)
        weight_V += tl.where(is_above, weight.to(tl.float64), 0.0)
    return tl.sum(count_V, 0), tl.sum(weight_V, 0)


@triton.jit
def _kept(
    row,
    first,
    num_equal,
    edge,
    num_equal_kept,
    min_p,
    top,
    temperature,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """(ids, weights, 0 for what is not kept, equals of the edge so far) of a run."""
    i, key, weight = _load(row, first, top, temperature, V, TOKENS)
    weight = weight.to(tl.float64)
    is_equal = (key == edge) & (i < V)
    rank = num_equal + tl.cumsum(is_equal.to(tl.int32), 0)
    is_kept = (key > edge) | (is_equal & (rank <= num_equal_kept))
    is_kept = is_kept & (weight >= min_p)
    return i, tl.where(is_kept, weight, 0.0), num_equal + tl.sum(is_equal.to(tl.int32), 0)


@triton.jit
def _kernel(
    logits, stride, temperatures, top_ks, top_ps, min_ps, uniforms, tokens,
    V: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    top, best, is_drawable = -float("inf"), 0, 1
    for first in range(0, V, TOKENS):
        i = first + tl.arange(0, TOKENS)
        z = tl.load(row + i, mask=i < V, other=-float("inf")).to(tl.float32)
        is_drawable = tl.minimum(is_drawable, tl.min((z < float("inf")).to(tl.int32), 0))  # nor is NaN
        largest = tl.max(z, 0)
        if largest > top:
            best = tl.min(tl.where(z == largest, i, V), 0)
            top = largest
    temperature = tl.load(temperatures + r)
    if (temperature == 0) | (is_drawable == 0) | (top == -float("inf")):
        tl.store(tokens + r, tl.minimum(best, V - 1).to(tl.int64))
        return
    top_k, top_p = tl.load(top_ks + r).to(tl.int32), tl.load(top_ps + r)
    edge, num_equal_kept = tl.full([], -1, tl.int64), V
    if (top_k > 0) & (top_k < V):
        edge = _lowest_kept(row, top_k, top, temperature, V, TOKENS, True)
        count, weight_above = _above(row, edge, top, temperature, V, TOKENS)
        num_equal_kept = top_k - count.to(tl.int32)
        total = weight_above + num_equal_kept * _weight_of(edge, top, temperature)
    else:
        count, total = _above(row, edge, top, temperature, V, TOKENS)
    if top_p < 1:
        target = tl.maximum(top_p * total, 1e-30)  # the first token weighs 1: for top_p = 0 it alone
        p_edge = _lowest_kept(row, target, top, temperature, V, TOKENS, False)
        if p_edge > edge:
            edge, num_equal_kept = p_edge, V
        count, weight_above = _above(row, edge, top, temperature, V, TOKENS)
        equal = tl.ceil((target - weight_above) / _weight_of(edge, top, temperature))
        num_equal_kept = tl.minimum(num_equal_kept, tl.maximum(equal, 1.0).to(tl.int32))
    min_p, uniform = tl.load(min_ps + r), tl.load(uniforms + r)
    num_equal, total = 0, tl.full([], 0.0, tl.float64)
    for first in range(0, V, TOKENS):
        i, weight, num_equal = _kept(
            row, first, num_equal, edge, num_equal_kept, min_p, top, temperature, V, TOKENS
        )
        total += tl.sum(weight, 0)
    target = uniform * total
    token, last, first, num_equal, before = V, 0, 0, 0, tl.full([], 0.0, tl.float64)
    while (first < V) & (token == V):
        i, weight, num_equal = _kept(
            row, first, num_equal, edge, num_equal_kept, min_p, top, temperature, V, TOKENS
        )
        token = tl.min(tl.where((before + tl.cumsum(weight, 0) > target) & (weight > 0), i, V), 0)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, i, 0), 0))
        before += tl.sum(weight, 0)
        first += TOKENS
    # Sums taken in another order may leave the last token a hair short of the target.
    tl.store(tokens + r, tl.where(token == V, last, token).to(tl.int64))


def sample(logits_RV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Token ids [R], int64."""
    num_rows, vocab_size = logits_RV.shape
    if logits_RV.stride(1) != 1 or not logits_RV.dtype.is_floating_point:
        raise ValueError(
            f"logits must be contiguous rows of floats, got {logits_RV.dtype} {logits_RV.stride()}"
        )
    if draws.temperature.shape != (num_rows,):
        raise ValueError(f"{num_rows} rows of logits, but {len(draws.temperature)} draws")
    token_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    if num_rows:
        _kernel[(num_rows,)](
            logits_RV, logits_RV.stride(0), draws.temperature, draws.top_k, draws.top_p, draws.min_p,
            draws.uniform, token_R, V=vocab_size, TOKENS=min(_TOKENS, triton.next_power_of_2(vocab_size)),
            num_warps=_WARPS,
        )  # fmt: skip
    return token_R
