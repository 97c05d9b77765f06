"""Rows of fp32 as 8-bit integers, each row with a scale of its own: q = round(x / s), s = max |x| / 127.

M rows, K items, P = K rounded up to a multiple of GROUP, the items that one instruction multiplies; the rest is 0.
q is in [-127, 127], ties go to the even one. offset = -128 sum(q): what products with weights that are stored 128 too
high (`kernels.int8_linear`) must begin at. What a row gives does not depend on the others.

A row with a NaN or an infinity has a scale of NaN, so that all its products are NaN: no number is made up for it. Below
a largest value of 2^-120 the scale stays that of 2^-120, so that its inverse is finite.
"""

import numpy as np
import torch
from numba import carray, cfunc, float32, int8, int32, int64, njit

from kernels.team import TASK, Call, Program, Step, bind, claim, pointer, words

GROUP = 4
TOP = 127
WEIGHT_OFFSET = 128
_MIN_TEAM_TOKENS = 8
_LEAST = np.float32(2.0**-120)
_MAGNITUDE, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)  # of the bits of a float
_ROUNDER = np.float32(1.5 * 2**23)  # added to a small number it leaves its nearest integer in the lowest bits


def padded(depth: int) -> int:
    return -(-depth // GROUP) * GROUP


def reference(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q [M, P] int8, scales [M], offsets [M] int32)."""
    top_M = x_MK.abs().amax(-1) if x_MK.shape[1] else x_MK.new_zeros(len(x_MK))
    finite_M = top_M.isfinite()
    top_M = top_M.clamp(min=float(_LEAST))
    inverse_M = torch.tensor(float(TOP)) / top_M  # a number divided by a tensor is rounded twice
    q_MK = torch.where(finite_M[:, None], (x_MK * inverse_M[:, None]).round(), 0.0).to(torch.int8)
    scale_M = torch.where(finite_M, top_M / TOP, torch.nan)
    q_MP = torch.nn.functional.pad(q_MK, (0, padded(x_MK.shape[1]) - x_MK.shape[1]))
    return q_MP, scale_M, -WEIGHT_OFFSET * q_MK.sum(-1, dtype=torch.int32)


@njit("float32(int64, int64, int64)", cache=True, nogil=True, error_model="numpy")
def quantize_row(x, q, depth):
    """Writes q and returns the scale; x and q are addresses."""
    bits_K = carray(pointer(x), (depth,), int32)
    top_bits = np.int32(0)  # the larger float has the larger bits
    for k in range(depth):
        top_bits = max(top_bits, np.int32(bits_K[k] & _MAGNITUDE))
    q_P = carray(pointer(q), ((depth + GROUP - 1) // GROUP * GROUP,), int8)
    q_P[depth:] = 0
    if top_bits >= _INFINITY:
        q_P[:] = 0
        return np.float32(np.nan)
    top = max(np.int32(top_bits).view(np.float32), _LEAST)
    inverse = np.float32(TOP) / top
    x_K = carray(pointer(x), (depth,), float32)
    for k in range(depth):
        q_P[k] = np.int8(np.float32(x_K[k] * inverse + _ROUNDER).view(np.int32))
    return top / np.float32(TOP)


@njit("int32(int64, int64)", cache=True, nogil=True)
def _sum(q, num_items):
    q_P = carray(pointer(q), (num_items,), int8)
    total = np.int32(0)
    for p in range(num_items):
        total = np.int32(total + np.int32(q_P[p]))
    return total


@cfunc(TASK, cache=True)
def _task(data):
    a = carray(data, (8,), int64)  # counter, step, x, q, scales, offsets, K, rows per token
    num_rows, depth = words(a[1], 1)[0] * a[7], a[6]
    stride = (depth + GROUP - 1) // GROUP * GROUP
    scale_M, offset_M = carray(pointer(a[4]), (num_rows,), float32), carray(pointer(a[5]), (num_rows,), int32)
    while True:
        row = claim(data)
        if row >= num_rows:
            return
        q = a[3] + stride * row
        scale_M[row] = quantize_row(a[2] + 4 * depth * row, q, depth)
        offset_M[row] = -WEIGHT_OFFSET * _sum(q, stride)


class Int8Rows:
    """Room for up to `num_rows` rows of `depth` items."""

    def __init__(self, num_rows: int, depth: int) -> None:
        self.depth = depth
        self.q_MP = torch.empty(num_rows, padded(depth), dtype=torch.int8)
        self.scale_M, self.offset_M = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int32)


def quantize_rows_call(step: Step, x_MK: torch.Tensor, rows: Int8Rows, *, rows_per_token: int = 1) -> Call:
    if x_MK.shape[1] != rows.depth:
        raise ValueError(f"rows of {rows.depth} items have no room for those of x {list(x_MK.shape)}")
    return bind(
        _task.address, step, x_MK, rows.q_MP, rows.scale_M, rows.offset_M, rows.depth, rows_per_token,
        min_team_tokens=_MIN_TEAM_TOKENS,
    )  # fmt: skip


def quantize_rows(x_MK: torch.Tensor) -> Int8Rows:
    """All rows of x."""
    rows, step = Int8Rows(*x_MK.shape), Step()
    step.fill(len(x_MK))
    Program([quantize_rows_call(step, x_MK.contiguous(), rows)]).run()
    return rows
