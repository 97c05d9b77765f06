"""y = x w^T + bias with 8-bit weights, one scale for each output, and rows of x made 8-bit on the way, a scale each.

M rows, K inputs, N outputs. y[m, n] = (sum_k w8[n, k] x8[m, k]) s_n s_m + bias[n], with w8 = round(w / s_n) in
[-127, 127], s_n = max_k |w[n, k]| / 127, and x8, s_m likewise (`kernels.int8_rows`): symmetric, dynamic W8A8, which
Dettmers et al., "LLM.int8()", 2022, call vector-wise. The sum is one of integers, exact: a row gives the same to the
last bit beside any others, on any number of threads and on any processor (`kernels.int8_tile`).

Weights are packed when they are loaded: blocks of BLOCK outputs, in each for every group of 4 inputs the bytes of all
its outputs, stored 128 too high as the instruction wants one side without sign. `offset` of a row of x takes that back.

Xeon with VNNI, two threads, K 1024, N 5632, against `kernels.linear`: M=1 0.17 ms (0.85), M=8 0.27 (1.0), M=32 0.44
(1.7), M=512 4.9 ms (20): 1.2 of the 1.3 trillion operations a second that the cores can at 2.6 GHz. As a processor
without AVX-512 the same: with AVX-VNNI M=1 0.29 ms (1.0), M=512 11.5 (36); with AVX2 alone 0.37 and 27.
"""

import numpy as np
import torch
from numba import carray, cfunc, int32, int64, njit

from kernels.int8_rows import GROUP, TOP, WEIGHT_OFFSET, Int8Rows, padded, quantize_row, quantize_rows_call
from kernels.int8_rows import reference as rows_reference
from kernels.int8_tile import BLOCK, MAX_TILE_COLUMNS, int8_tile, room_for_sums
from kernels.linear import add_bias
from kernels.packed_weights import PackedWeights
from kernels.team import TASK, Call, Program, Step, bind, claim, floats, pointer, words

ROWS, CHUNK = 96, 2 * BLOCK  # rows and outputs of a work item
# Beyond it a sum of products of bytes could leave 32 bits.
MAX_DEPTH = (2**31 - 1) // ((TOP + WEIGHT_OFFSET) * TOP)


class Int8Weights(PackedWeights):
    """The packed weights of one product, or of several of one shape (experts), one after the other."""

    def __init__(self, num_outputs: int, depth: int, *, num_experts: int = 1) -> None:
        """Zero until `put`."""
        if depth > MAX_DEPTH:
            raise ValueError(f"int8 products take at most {MAX_DEPTH} inputs, got {depth}")
        super().__init__(num_outputs, depth, num_experts=num_experts)
        num_blocks = -(-num_outputs // BLOCK)
        shape = (num_experts, num_blocks, padded(depth) // GROUP, BLOCK, GROUP)
        self.packed = torch.full(shape, WEIGHT_OFFSET, dtype=torch.uint8)
        self.scale_EN = torch.zeros(num_experts, num_blocks * BLOCK)

    def put(self, w_NK: torch.Tensor, *, start: int = 0, expert: int = 0) -> None:
        """Quantizes fp32 rows as outputs `start` and those after it."""
        self.check_rows(w_NK, start=start)
        _pack(w_NK.contiguous().numpy(), start, self.packed[expert].numpy(), self.scale_EN[expert].numpy())


def reference(x_MK: torch.Tensor, w_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """From weights that are not quantized yet."""
    (x8_MP, x_scale_M, _), (w8_NP, w_scale_N, _) = rows_reference(x_MK), rows_reference(w_NK)
    y_MN = (x8_MP.long() @ w8_NP.long().T).float() * w_scale_N * x_scale_M[:, None]
    return y_MN if bias_N is None else y_MN + bias_N


@njit("void(float32[:,::1], int64, uint8[:,:,:,::1], float32[::1])", cache=True, nogil=True)
def _pack(w_NK, start, packed, scale_N):
    num_rows, depth = w_NK.shape
    q_P = np.empty((depth + GROUP - 1) // GROUP * GROUP, np.int8)
    for row in range(num_rows):
        n = start + row
        scale_N[n] = quantize_row(np.int64(w_NK[row].ctypes.data), np.int64(q_P.ctypes.data), depth)
        block, place = n // BLOCK, n % BLOCK
        for p in range(len(q_P)):
            packed[block, p // GROUP, place, p % GROUP] = np.uint8(np.int16(q_P[p]) + WEIGHT_OFFSET)


@njit("void(int64, float32, float32[::1], float32[::1])", cache=True, nogil=True)
def _scale_row(sums, x_scale, scale_N, y_N):
    sum_N = carray(pointer(sums), (len(y_N),), int32)
    for n in range(len(y_N)):
        y_N[n] = np.float32(sum_N[n]) * scale_N[n] * x_scale


@njit("UniTuple(int64,2)(int64,int64)", cache=True, nogil=True)
def int8_sizes(depth, num_outputs):
    """Bytes of a row, and outputs with those that fill the last block."""
    return (depth + GROUP - 1) // GROUP * GROUP, (num_outputs + BLOCK - 1) // BLOCK * BLOCK


@njit(
    "void(UniTuple(int64,3), UniTuple(int64,2), int64, int64, int64, int64, int64, int64)",
    cache=True,
    nogil=True,
)
def multiply(x, w, y, num_rows, depth, num_outputs, start, stop):
    """Outputs start..stop-1 of all rows, start a multiple of BLOCK.

    Addresses: x of q, scales and offsets, w of packed weights and scales, y.
    """
    stride, _ = int8_sizes(depth, num_outputs)
    num_groups, block_bytes = stride // GROUP, stride * BLOCK
    scale_M, sums = floats(x[1], num_rows), room_for_sums()
    num_passes = (num_rows + MAX_TILE_COLUMNS - 1) // MAX_TILE_COLUMNS
    for first in range(start, stop, BLOCK):
        w_block = w[0] + first // BLOCK * block_bytes
        width = min(BLOCK, stop - first)
        scale_N = floats(w[1] + 4 * first, width)
        # While the tiles of x pass, the next block comes from memory; the one after the last is another thread's.
        ahead, speed = w_block, 0
        if first + BLOCK < stop and num_passes > 1:
            ahead, speed = w_block + block_bytes, GROUP * BLOCK // num_passes
        for row in range(0, num_rows, MAX_TILE_COLUMNS):
            columns = min(MAX_TILE_COLUMNS, num_rows - row)
            int8_tile(
                columns, w_block, num_groups, x[0] + stride * row, stride, x[2] + 4 * row, sums, ahead, speed
            )
            ahead += speed * num_groups
            for m in range(columns):
                y_N = floats(y + 4 * ((row + m) * num_outputs + first), width)
                _scale_row(sums + 4 * BLOCK * m, scale_M[row + m], scale_N, y_N)


@cfunc(TASK, cache=True)
def _task(data):
    a = carray(data, (11,), int64)  # counter, step, q, x scales, offsets, w, w scales, bias, y, K, N
    num_rows, depth, num_outputs = words(a[1], 1)[0], a[9], a[10]
    num_row_blocks = max(1, (num_rows + ROWS - 1) // ROWS)
    stride, _ = int8_sizes(depth, num_outputs)
    while True:
        item = claim(data)
        start, row = item // num_row_blocks * CHUNK, item % num_row_blocks * ROWS
        if start >= num_outputs:
            return
        stop, block_rows = min(start + CHUNK, num_outputs), min(ROWS, num_rows - row)
        y = a[8] + 4 * row * num_outputs
        x = (a[2] + stride * row, a[3] + 4 * row, a[4] + 4 * row)
        multiply(x, (a[5], a[6]), y, block_rows, depth, num_outputs, start, stop)
        if a[7] != 0:
            add_bias(y, a[7], block_rows, num_outputs, start, stop)


def int8_linear_calls(
    step: Step, x_MK: torch.Tensor, weights: Int8Weights, bias_N: torch.Tensor | None, *, out_MN: torch.Tensor
) -> list[Call]:
    """Multiplies as many rows as the step has tokens."""
    num_outputs, depth = weights.num_outputs, weights.depth
    if x_MK.shape[1] != depth or out_MN.shape[1] != num_outputs:
        raise ValueError(
            f"w {[num_outputs, depth]} does not fit x {list(x_MK.shape)} and y {list(out_MN.shape)}"
        )
    rows = Int8Rows(len(x_MK), depth)
    x, w = (rows.q_MP, rows.scale_M, rows.offset_M), (weights.packed, weights.scale_EN)
    return [
        quantize_rows_call(step, x_MK, rows),
        bind(_task.address, step, *x, *w, bias_N, out_MN, depth, num_outputs),
    ]


def int8_linear(x_MK: torch.Tensor, weights: Int8Weights, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x w^T + bias of any number of rows."""
    out_MN, step = x_MK.new_empty(len(x_MK), weights.num_outputs), Step()
    step.fill(len(x_MK))
    Program(int8_linear_calls(step, x_MK.contiguous(), weights, bias_N, out_MN=out_MN)).run()
    return out_MN
