"""Linear layers whose weights have 8 or 4 bits (`quantized_weight`): y = x W^T.

With weights of int8 and int4 x is as it comes. With weights of fp8 it is of fp8 too (`fp8_rows`), however many tokens
there are, so that what a token gives does not depend on those beside it. The tensor core multiplies these twice as fast
as bfloat16; it adds up a group by itself, in fewer bits than float32, and groups are added up in float32.

T tokens, N outputs, K inputs, J groups, I parts of K. Weights are the first operand (y^T = W x^T), which wgmma takes
from registers, where they were unpacked: so a single token fills a tensor core's tile as well as many do.

For few tokens the layer is as fast as its weights are read, and a tile of outputs for each of 132 processors is too few
to keep memory busy: K is cut into parts, whose number depends on N and K alone, and their products are added up.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu import fp8_rows
from kernels.gpu.quantized_weight import GROUP, QuantizedWeight, add_group
from kernels.gpu.tiling import Tiling

_FEW_TOKENS = 64
TILINGS = {  # by whether there are few tokens; the columns are tokens, and grow with them while they are few
    True: Tiling(rows=64, columns=16, num_warps=4, num_stages=4),
    False: Tiling(rows=128, columns=128, num_warps=8, num_stages=3),
}
_MIN_PROGRAMS = 512  # that read at once: four on each of 132 processors
_MIN_INPUTS_OF_PART = 4 * GROUP


def reference(x_TK: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """y [T, N] in float32."""
    x_TK = fp8_rows.rounded(x_TK) if weight.is_fp8 else x_TK.float()
    return x_TK @ weight.whole().T


@triton.jit(do_not_specialize=["num_tokens"])
def _kernel(
    x, stride_x, x_scales, numbers, scales, zeros, y, num_tokens,
    N: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = K // GROUP
    # Tokens first: the tiles of tokens that need the same weights run at the same time.
    token_T = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(2)
    # What lies outside is read from the edge and not written: no masks in the loop.
    x_T = x + tl.minimum(token_T, num_tokens - 1) * stride_x
    n_inside = tl.minimum(n, N - 1)
    numbers_N = numbers + n_inside.to(tl.int64) * (K // 2 if PACKED else K)
    acc_NT = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for j in tl.range(part * J // PARTS, (part + 1) * J // PARTS):
        acc_NT = add_group(acc_NT, x_T, numbers_N, scales, zeros, n_inside * J, j, GROUP, PACKED)
    if x_scales is not None:
        acc_NT *= tl.load(x_scales + tl.minimum(token_T, num_tokens - 1))[None, :]
    place_TN = y + (part * num_tokens + token_T)[:, None] * N + n[None, :]
    inside_TN = (token_T < num_tokens)[:, None] & (n < N)[None, :]
    tl.store(place_TN, tl.trans(acc_NT).to(y.dtype.element_ty), mask=inside_TN)


def quantized_linear(x_TK: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """y [T, N] in the dtype of x."""
    num_tokens, num_inputs = x_TK.shape
    num_outputs, dtype = len(weight.numbers_NK), x_TK.dtype
    if num_inputs != weight.num_inputs or x_TK.stride(1) != 1:
        raise ValueError(f"rows of {num_inputs} inputs for a weight of {weight.num_inputs}")
    if weight.orders_EK is not None:
        [order_K] = weight.orders_EK
        x_TK = x_TK.index_select(1, order_K)
    x_TK, x_scales_T = fp8_rows.fp8_rows(x_TK) if weight.is_fp8 else (x_TK, None)
    is_few = num_tokens <= _FEW_TOKENS
    tiling = TILINGS[is_few]
    columns = max(tiling.columns, triton.next_power_of_2(num_tokens)) if is_few else tiling.columns
    parts = _num_parts(num_outputs, num_inputs, tiling) if is_few else 1
    y_ITN = x_TK.new_empty(parts, num_tokens, num_outputs, dtype=dtype if parts == 1 else torch.float32)
    if num_tokens:
        _kernel[(triton.cdiv(num_tokens, columns), triton.cdiv(num_outputs, tiling.rows), parts)](
            x_TK, x_TK.stride(0), x_scales_T, weight.numbers_NK, weight.scales_NJ, weight.zeros_NJ, y_ITN,
            num_tokens, N=num_outputs, K=num_inputs, OUTPUTS=tiling.rows, TOKENS=columns,
            GROUP=weight.group_size, PARTS=parts, PACKED=weight.is_packed, num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )  # fmt: skip
    return y_ITN[0] if parts == 1 else y_ITN.sum(0).to(dtype)


def _num_parts(num_outputs: int, num_inputs: int, tiling: Tiling) -> int:
    wanted = triton.cdiv(_MIN_PROGRAMS, triton.cdiv(num_outputs, tiling.rows))
    return max(1, min(wanted, num_inputs // _MIN_INPUTS_OF_PART))
