"""The gate of a MLP: y = silu(gate) * up, silu(z) = z / (1 + exp(-z)), in float32 and rounded once.

gate_up_TW [T, 2I] holds all I gates, then all I ups; y is [T, I].
"""

import torch
import triton
import triton.language as tl

_CHANNELS, _WARPS = 1024, 4


def reference(gate_up_TW: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = gate_up_TW.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TI) * up_TI


@triton.jit
def _kernel(gate_up, stride, y, I: tl.constexpr, CHANNELS: tl.constexpr):  # noqa: E741 - the shape's letter
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    gate_I = tl.load(gate_up + token * stride + i, mask=i < I, other=0.0).to(tl.float32)
    up_I = tl.load(gate_up + token * stride + I + i, mask=i < I, other=0.0).to(tl.float32)
    y_I = gate_I / (1.0 + tl.exp(-gate_I)) * up_I
    tl.store(y + token * I + i, y_I.to(y.dtype.element_ty), mask=i < I)


def silu_mul(gate_up_TW: torch.Tensor) -> torch.Tensor:
    num_tokens, width = gate_up_TW.shape
    if width % 2 or gate_up_TW.stride(1) != 1:
        raise ValueError(f"gate and up must be rows of two equal halves, got {list(gate_up_TW.shape)}")
    out_TI = gate_up_TW.new_empty(num_tokens, width // 2)
    if num_tokens:
        _kernel[(num_tokens, triton.cdiv(width // 2, _CHANNELS))](
            gate_up_TW, gate_up_TW.stride(0), out_TI, I=width // 2, CHANNELS=_CHANNELS, num_warps=_WARPS
        )
    return out_TI
