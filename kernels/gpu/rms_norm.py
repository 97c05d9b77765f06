"""Root mean square norm: y = x / sqrt(mean(x^2) + eps) * weight, and the same after adding to the residual stream.

T tokens, D channels (DP: up to the next power of two). Sums are taken in float32 for every dtype (Zhang and Sennrich,
2019); what is multiplied by the weight is rounded first, as Hugging Face's models do. The norms of queries and keys are
part of `rotate_and_store`, which has them in registers anyway.
"""

import torch
import triton
import triton.language as tl

_CHANNELS_PER_WARP = 1024


def reference(x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


@triton.jit
def _kernel(
    x, stride_x, delta, stride_delta, weight, y, eps,
    D: tl.constexpr, DP: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    is_channel_D = d < D
    x_D = tl.load(x + token * stride_x + d, mask=is_channel_D, other=0.0)
    if ADDS:
        delta_D = tl.load(delta + token * stride_delta + d, mask=is_channel_D, other=0.0)
        x_D = (x_D.to(tl.float32) + delta_D).to(x_D.dtype)
        tl.store(x + token * stride_x + d, x_D, mask=is_channel_D)
    wide_D = x_D.to(tl.float32)
    normed_D = (wide_D * tl.rsqrt(tl.sum(wide_D * wide_D, 0) / D + eps)).to(x_D.dtype)
    y_D = tl.load(weight + d, mask=is_channel_D, other=0.0).to(tl.float32) * normed_D
    tl.store(y + token * D + d, y_D.to(x_D.dtype), mask=is_channel_D)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
    """The norm of each row."""
    return _launch(x_TD, None, weight_D, eps)


def add_rms_norm_(
    residual_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """residual += delta, in place; returns the norm of the sum."""
    if delta_TD.shape != residual_TD.shape or delta_TD.stride(1) != 1:
        raise ValueError(f"delta must be rows like {list(residual_TD.shape)}, got {list(delta_TD.shape)}")
    return _launch(residual_TD, delta_TD, weight_D, eps)


def _launch(
    x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    num_tokens, width = x_TD.shape
    if weight_D.shape != (width,) or x_TD.stride(1) != 1:
        raise ValueError(f"a weight of {list(weight_D.shape)} for rows of {width} channels")
    out_TD = x_TD.new_empty(num_tokens, width)
    padded = triton.next_power_of_2(width)
    if num_tokens:
        _kernel[(num_tokens,)](
            x_TD, x_TD.stride(0), delta_TD, 0 if delta_TD is None else delta_TD.stride(0), weight_D, out_TD, eps,
            D=width, DP=padded, ADDS=delta_TD is not None,
            num_warps=min(16, max(1, padded // _CHANNELS_PER_WARP)),
        )  # fmt: skip
    return out_TD
