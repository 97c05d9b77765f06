"""Products of rows with the weights of the expert that each belongs to: y_s = W_e x_source(s), e the expert of row s.

S rows sorted by expert, those of expert e from starts[e] to starts[e + 1] - 1; E experts, N outputs, K inputs. Row s of
y comes from row sources_S[s] of x, so that tokens are read where they are and not copied once for each of their
experts. An expert's rows are rounded up to whole tiles of its own and to no common capacity (Gale et al.,
"MegaBlocks", 2023).

Weights are the first operand (y^T = W x^T): an expert that got one row wastes 15 columns of a tensor core's 16 instead
of 63 rows of 64.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.ragged_tiles import num_tiles, rows_of

_OUTPUTS, _INPUTS = 128, 64


def reference(
    x_TK: torch.Tensor, weight_ENK: torch.Tensor, *, sources_S: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """y [S, N] in float32."""
    y_SN = x_TK.new_empty(len(sources_S), weight_ENK.shape[1], dtype=torch.float32)
    bounds = starts.tolist()
    for expert, weight_NK in enumerate(weight_ENK):
        rows = slice(bounds[expert], bounds[expert + 1])
        y_SN[rows] = x_TK[sources_S[rows]].float() @ weight_NK.float().T
    return y_SN


@triton.jit(do_not_specialize=["num_experts"])
def _kernel(
    x, stride_x, weight, sources, starts, num_experts, y,
    N: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    expert, first, stop = rows_of(starts, tl.program_id(0), num_experts, ROWS)
    if first >= stop:
        return
    s = first + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, INPUTS)
    # What lies outside is read from the edge and not written.
    x_S = x + tl.load(sources + tl.minimum(s, stop - 1)).to(tl.int64) * stride_x
    weight_N = weight + (expert.to(tl.int64) * N + tl.minimum(n, N - 1)) * K
    acc_NS = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in tl.range(0, K, INPUTS):
        if K % INPUTS == 0:
            w_NK = tl.load(weight_N[:, None] + (start + k)[None, :])
            x_SK = tl.load(x_S[:, None] + (start + k)[None, :])
        else:
            inside_1K = (start + k < K)[None, :]
            w_NK = tl.load(weight_N[:, None] + (start + k)[None, :], mask=inside_1K, other=0.0)
            x_SK = tl.load(x_S[:, None] + (start + k)[None, :], mask=inside_1K, other=0.0)
        acc_NS = tl.dot(w_NK, tl.trans(x_SK), acc_NS, input_precision="ieee")
    place_SN = y + s.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place_SN, tl.trans(acc_NS).to(y.dtype.element_ty), mask=(s < stop)[:, None] & (n < N)[None, :])


def grouped_matmul(
    x_TK: torch.Tensor, weight_ENK: torch.Tensor, *, sources_S: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """y [S, N] in the dtype of x."""
    num_experts, num_outputs, num_inputs = weight_ENK.shape
    if x_TK.shape[1] != num_inputs or x_TK.stride(1) != 1 or x_TK.dtype != weight_ENK.dtype:
        raise ValueError(
            f"rows of {x_TK.shape[1]} {x_TK.dtype} for weights of {num_inputs} {weight_ENK.dtype}"
        )
    if len(starts) != num_experts + 1 or not weight_ENK.is_contiguous():
        raise ValueError(f"{num_experts} experts need one start more, got {len(starts)}")
    num_rows = len(sources_S)
    num_tile_rows = tile_rows(num_rows, num_experts)
    y_SN = x_TK.new_empty(num_rows, num_outputs)
    if num_rows:
        tiles = num_tiles(num_rows, num_experts, tile_rows=num_tile_rows)
        _kernel[(tiles, triton.cdiv(num_outputs, _OUTPUTS))](
            x_TK, x_TK.stride(0), weight_ENK, sources_S, starts, num_experts, y_SN,
            N=num_outputs, K=num_inputs, OUTPUTS=_OUTPUTS, ROWS=num_tile_rows, INPUTS=_INPUTS,
            num_warps=4 if num_tile_rows <= 64 else 8, num_stages=4,
        )  # fmt: skip
    return y_SN


def tile_rows(num_rows: int, num_experts: int) -> int:
    """Of a tile of the size of an expert's share: 16, 32, 64 or 128."""
    return min(128, max(16, triton.next_power_of_2(num_rows // num_experts)))
