"""The gate of a MLP: y = silu(gate) * up, silu(z) = z / (1 + exp(-z)).

gate_up_TW [T, 2I] holds all I gates, then all I ups; y is [T, I].
"""

import numpy as np
import torch
from numba import carray, cfunc, int64, njit

from kernels.exponential import exponential
from kernels.team import TASK, Call, Program, Step, bind, claim, floats, words

_MIN_TEAM_TOKENS = 8


def reference(gate_up_TW: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = gate_up_TW.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TI) * up_TI


@njit("void(float32[::1], float32[::1], float32[::1])", cache=True, nogil=True, error_model="numpy")
def _row(gate_I, up_I, y_I):
    for i in range(len(y_I)):
        y_I[i] = gate_I[i] / (np.float32(1.0) + exponential(-gate_I[i])) * up_I[i]


@cfunc(TASK, cache=True)
def _task(data):
    a = carray(data, (6,), int64)  # counter, step, gate_up, y, I, rows per token
    num_rows, width = words(a[1], 1)[0] * a[5], a[4]
    while True:
        row = claim(data)
        if row >= num_rows:
            return
        gate = a[2] + 8 * row * width
        _row(floats(gate, width), floats(gate + 4 * width, width), floats(a[3] + 4 * row * width, width))


def silu_mul_call(
    step: Step, gate_up_TW: torch.Tensor, *, out_TI: torch.Tensor, rows_per_token: int = 1
) -> Call:
    width = out_TI.shape[1]
    if gate_up_TW.shape[1] != 2 * width:
        raise ValueError(
            f"gate_up must have {2 * width} channels for {width} outputs, got {gate_up_TW.shape[1]}"
        )
    arguments = (gate_up_TW, out_TI, width, rows_per_token)
    return bind(_task.address, step, *arguments, min_team_tokens=_MIN_TEAM_TOKENS)


def silu_mul(gate_up_TW: torch.Tensor, *, out_TI: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up, into `out_TI` if given."""
    if gate_up_TW.dtype != torch.float32:
        return reference(gate_up_TW)
    if out_TI is None:
        out_TI = gate_up_TW.new_empty(len(gate_up_TW), gate_up_TW.shape[1] // 2)
    step = Step()
    step.fill(len(gate_up_TW))
    Program([silu_mul_call(step, gate_up_TW, out_TI=out_TI)]).run()
    return out_TI
