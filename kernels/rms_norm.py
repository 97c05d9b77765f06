"""Root mean square norm: y = x / sqrt(mean(x^2) + eps) * weight, and the same after adding to the residual stream.

T tokens, D channels. Sums are taken in fp32 for every dtype (Zhang and Sennrich, 2019).
"""

import torch


def reference(x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
    return reference(x_TD, weight_D, eps=eps)


def add_rms_norm_(
    residual_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """residual += delta, in place; returns the norm of the sum."""
    residual_TD += delta_TD
    return reference(residual_TD, weight_D, eps=eps)
