"""Rows of 8 bits with a scale each: x_tk = x8_tk scale_t, scale_t = max_k |x_tk| / 448, x8 in e4m3.

What products with weights of fp8 multiply, on the tensor cores' fp8. T tokens, K inputs (KP: up to the next power of
two).
"""

import torch
import triton
import triton.language as tl

LARGEST = 448.0
_INPUTS_PER_WARP = 1024


def reference(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x8 [T, K], scales [T] in float32)."""
    scale_T = x_TK.float().abs().amax(-1) / LARGEST
    divisor_T1 = torch.where(scale_T == 0, 1.0, scale_T).unsqueeze(1)
    return (x_TK.float() / divisor_T1).to(torch.float8_e4m3fn), scale_T


def rounded(x_TK: torch.Tensor) -> torch.Tensor:
    """What the rows of 8 bits stand for, in float32."""
    x8_TK, scale_T = reference(x_TK)
    return x8_TK.float() * scale_T.unsqueeze(1)


@triton.jit
def _kernel(x, stride_x, x8, scales, largest, K: tl.constexpr, KP: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    x_K = tl.load(x + token * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x_K), 0) / largest
    tl.store(scales + token, scale)
    x8_K = x_K / tl.where(scale == 0, 1.0, scale)
    tl.store(x8 + token * K + k, x8_K.to(tl.float8e4nv), mask=k < K)


def fp8_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x8 [T, K], scales [T] in float32); a row of zeros has scale 0."""
    num_tokens, num_inputs = x_TK.shape
    if x_TK.stride(1) != 1:
        raise ValueError(f"rows must be contiguous, got strides {x_TK.stride()}")
    x8_TK = x_TK.new_empty(num_tokens, num_inputs, dtype=torch.float8_e4m3fn)
    scale_T = x_TK.new_empty(num_tokens, dtype=torch.float32)
    padded = triton.next_power_of_2(num_inputs)
    if num_tokens:
        _kernel[(num_tokens,)](
            x_TK, x_TK.stride(0), x8_TK, scale_T, LARGEST, K=num_inputs, KP=padded,
            num_warps=min(16, max(1, padded // _INPUTS_PER_WARP)),
        )  # fmt: skip
    return x8_TK, scale_T
