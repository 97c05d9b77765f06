"""`grouped_matmul` with weights of 8 or 4 bits: y_s = W_e x_source(s), e the expert of row s.

S rows sorted by expert, their tiles as there, weights and their products as in `quantized_weight`; with weights of fp8
x is of fp8 too, as in `quantized_linear`. K is not cut into parts: the experts of a few tokens are tiles enough.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu import fp8_rows, grouped_matmul
from kernels.gpu.grouped_matmul import tile_rows
from kernels.gpu.quantized_weight import QuantizedWeight, add_group
from kernels.gpu.ragged_tiles import num_tiles, rows_of
from kernels.gpu.tiling import Tiling

TILINGS = {  # by the columns, the rows of an expert
    tiling.columns: tiling
    for tiling in (
        Tiling(rows=64, columns=16, num_warps=4, num_stages=4),
        Tiling(rows=64, columns=32, num_warps=4, num_stages=4),
        Tiling(rows=64, columns=64, num_warps=4, num_stages=4),
        Tiling(rows=128, columns=128, num_warps=8, num_stages=3),
    )
}


def reference(
    x_TK: torch.Tensor, weight: QuantizedWeight, *, sources_S: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """y [S, N] in float32."""
    weight_ENK = weight.whole().unflatten(0, (len(starts) - 1, -1))
    x_TK = fp8_rows.rounded(x_TK) if weight.is_fp8 else x_TK
    return grouped_matmul.reference(x_TK, weight_ENK, sources_S=sources_S, starts=starts)


@triton.jit(do_not_specialize=["num_experts"])
def _kernel(
    x, stride_x, x_scales, numbers, scales, zeros, sources, starts, num_experts, y,
    N: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = K // GROUP
    expert, first, stop = rows_of(starts, tl.program_id(0), num_experts, ROWS)
    if first >= stop:
        return
    s = first + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    # What lies outside is read from the edge and not written.
    source_S = tl.load(sources + tl.minimum(s, stop - 1)).to(tl.int64)
    x_S = x + source_S * stride_x
    row_N = expert * N + tl.minimum(n, N - 1)
    numbers_N = numbers + row_N.to(tl.int64) * (K // 2 if PACKED else K)
    acc_NS = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for j in tl.range(0, J):
        acc_NS = add_group(acc_NS, x_S, numbers_N, scales, zeros, row_N * J, j, GROUP, PACKED)
    if x_scales is not None:
        acc_NS *= tl.load(x_scales + source_S)[None, :]
    place_SN = y + s.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place_SN, tl.trans(acc_NS).to(y.dtype.element_ty), mask=(s < stop)[:, None] & (n < N)[None, :])


def grouped_quantized_matmul(
    x_TK: torch.Tensor, weight: QuantizedWeight, *, sources_S: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """y [S, N] in the dtype of x."""
    num_experts, num_rows, dtype = len(starts) - 1, len(sources_S), x_TK.dtype
    num_outputs, left_over = divmod(len(weight.numbers_NK), num_experts)
    if x_TK.shape[1] != weight.num_inputs or x_TK.stride(1) != 1:
        raise ValueError(f"rows of {x_TK.shape[1]} inputs for weights of {weight.num_inputs}")
    if left_over or (weight.orders_EK is not None and len(weight.orders_EK) != num_experts):
        raise ValueError(f"{len(weight.numbers_NK)} rows of weights are not those of {num_experts} experts")
    if weight.orders_EK is not None:
        x_TK, sources_S = _ordered(x_TK, weight.orders_EK, sources_S, starts)
    x_TK, x_scales_T = fp8_rows.fp8_rows(x_TK) if weight.is_fp8 else (x_TK, None)
    tiling = TILINGS[tile_rows(num_rows, num_experts)]
    y_SN = x_TK.new_empty(num_rows, num_outputs, dtype=dtype)
    if num_rows:
        tiles = num_tiles(num_rows, num_experts, tile_rows=tiling.columns)
        _kernel[(tiles, triton.cdiv(num_outputs, tiling.rows))](
            x_TK, x_TK.stride(0), x_scales_T, weight.numbers_NK, weight.scales_NJ, weight.zeros_NJ, sources_S,
            starts, num_experts, y_SN, N=num_outputs, K=weight.num_inputs, OUTPUTS=tiling.rows,
            ROWS=tiling.columns, GROUP=weight.group_size, PACKED=weight.is_packed, num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )  # fmt: skip
    return y_SN


def _ordered(
    x_TK: torch.Tensor, orders_EK: torch.Tensor, sources_S: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of x for each row of y, in the order of its expert, and where it is."""
    rows_S = torch.arange(len(sources_S), device=x_TK.device)
    expert_S = torch.searchsorted(starts, rows_S, right=True) - 1
    return x_TK[sources_S].gather(1, orders_EK[expert_S]), rows_S
