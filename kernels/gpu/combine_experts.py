"""What its experts gave for each token, weighted and added up: y_t = sum_k weight_tk row_place(t, k).

T tokens, K active experts per token, S = T K rows sorted by expert as `grouped_matmul` gives them, D channels. Choice
(t, k) is row places_TK[t, k]. The sum is taken in float32 and in the order of k, so that it does not depend on how rows
were sorted.
"""

import torch
import triton
import triton.language as tl

_CHANNELS, _WARPS = 1024, 4


def reference(rows_SD: torch.Tensor, *, places_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """y [T, D] in float32."""
    return (rows_SD[places_TK].float() * weights_TK.float().unsqueeze(-1)).sum(1)


@triton.jit
def _kernel(rows, places, weights, y, K: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sum_D = tl.zeros([CHANNELS], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + token * K + k).to(tl.int64)
        weight = tl.load(weights + token * K + k).to(tl.float32)
        sum_D += weight * tl.load(rows + place * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + token * D + d, sum_D.to(y.dtype.element_ty), mask=d < D)


def combine_experts(
    rows_SD: torch.Tensor, *, places_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """y [T, D] in the dtype of the rows."""
    (num_rows, width), (num_tokens, num_active) = rows_SD.shape, places_TK.shape
    if num_rows != num_tokens * num_active or weights_TK.shape != places_TK.shape:
        got = [list(places_TK.shape), list(weights_TK.shape)]
        raise ValueError(f"{num_rows} rows need as many places and weights, got {got}")
    if not (rows_SD.is_contiguous() and places_TK.is_contiguous() and weights_TK.is_contiguous()):
        raise ValueError("rows, places and weights must be contiguous")
    y_TD = rows_SD.new_empty(num_tokens, width)
    if num_tokens:
        _kernel[(num_tokens, triton.cdiv(width, _CHANNELS))](
            rows_SD, places_TK, weights_TK, y_TD, K=num_active, D=width, CHANNELS=_CHANNELS, num_warps=_WARPS
        )
    return y_TD
