"""Root mean square norm: y = x / sqrt(mean(x^2) + eps) * weight, and the same after adding to the residual stream.

T tokens, D channels. Sums are taken in fp32 for every dtype (Zhang and Sennrich, 2019).
"""

import torch
from numba import carray, cfunc, float64, int64, njit

from kernels.team import TASK, Call, Program, Step, bind, claim, floats, words

_MIN_TEAM_TOKENS = 16


def reference(x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


@njit("void(float32[::1], float32[::1], float32[::1], float64)", cache=True, nogil=True, fastmath=True)
def norm_row(x_D, weight_D, y_D, eps):
    """One row; x and y may be the same memory."""
    total = x_D[0] * 0
    for d in range(len(x_D)):
        total += x_D[d] * x_D[d]
    scale = x_D.dtype.type((total / len(x_D) + eps) ** -0.5)
    for d in range(len(x_D)):
        y_D[d] = x_D[d] * scale * weight_D[d]


@njit("void(float32[::1], float32[::1])", cache=True, nogil=True, fastmath=True)
def _add_row(x_D, delta_D):
    for d in range(len(x_D)):
        x_D[d] += delta_D[d]


@cfunc(TASK, cache=True)
def _task(data):
    a = carray(data, (8,), int64)  # counter, step, residual, delta, weight, y, D, eps
    eps = carray(data, (8,), float64)[7]
    num_tokens, width = words(a[1], 1)[0], a[6]
    while True:
        token = claim(data)
        if token >= num_tokens:
            return
        offset = 4 * token * width
        x_D = floats(a[2] + offset, width)
        if a[3] != 0:
            _add_row(x_D, floats(a[3] + offset, width))
        norm_row(x_D, floats(a[4], width), floats(a[5] + offset, width), eps)


def add_rms_norm_call(
    step: Step,
    residual_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    *,
    eps: float,
    out_TD: torch.Tensor,
) -> Call:
    """residual += delta (if any), in place; out = norm(residual)."""
    width = weight_D.shape[0]
    arguments = (residual_TD, delta_TD, weight_D, out_TD, width, float(eps))
    return bind(_task.address, step, *arguments, min_team_tokens=_MIN_TEAM_TOKENS)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
    """The norm of each row."""
    return _launch(x_TD, None, weight_D, eps)


def add_rms_norm_(
    residual_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """residual += delta, in place; returns the norm of the sum."""
    return _launch(residual_TD, delta_TD, weight_D, eps)


def _launch(
    x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    if x_TD.dtype != torch.float32:
        if delta_TD is not None:
            x_TD += delta_TD
        return reference(x_TD, weight_D, eps=eps)
    out_TD, step = torch.empty_like(x_TD), Step()
    step.fill(len(x_TD))
    Program([add_rms_norm_call(step, x_TD, delta_TD, weight_D, eps=eps, out_TD=out_TD)]).run()
    return out_TD
