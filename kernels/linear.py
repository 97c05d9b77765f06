"""y = x w^T + bias in fp32, with the weights in panels (`kernels.panels`).

M rows, K inputs, N outputs; x [M, K], w [N, K], y [M, N]. A panel is read in blocks of 256 inputs, which stay in
L1 while up to 64 rows of x pass, 12 at a time; meanwhile the next block is on its way from memory. What a row gives
does not depend on the others (`kernels.panel_tile`), which is why torch's linear is not taken.

Xeon with AVX-512, two threads, K 1024, N 5632, in turns with what was here before (sums along K, of weights as the
checkpoint has them): M=1 0.80 ms (0.96), M=8 0.93 (1.14), M=32 1.51 (1.91), M=512 18.1 (21.0), 326 GFLOP/s.
"""

import torch
from numba import carray, cfunc, int64, njit

from kernels.panel_tile import MAX_TILE_ROWS, PANEL, panel_tile
from kernels.panels import Panels
from kernels.team import TASK, Call, Program, Step, bind, claim, floats, words
from kernels.vectors import F32, make_room

ROWS = 64  # of a work item
CHUNK = 64  # outputs of a work item, whole panels
_BLOCK_DEPTH = 256  # inputs: 32 KiB of a panel with AVX-512
_room = make_room(F32, ROWS * PANEL)


def reference(x_MK: torch.Tensor, w_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.linear(x_MK, w_NK, bias_N)


@njit("void(int64,int64,int64,int64,int64,int64,int64)", cache=True, nogil=True)
def _multiply_panel(x, w, y, num_rows, depth, y_stride, following):
    num_passes = (num_rows + MAX_TILE_ROWS - 1) // MAX_TILE_ROWS
    # While the rows pass, the next block comes from memory, `speed` bytes for each input.
    speed = 4 * PANEL // num_passes
    for k in range(0, depth, _BLOCK_DEPTH):
        block, size = w + 4 * PANEL * k, min(_BLOCK_DEPTH, depth - k)
        ahead = following if k + size == depth else block + 4 * PANEL * size
        for number in range(num_passes):
            row, end = num_rows * number // num_passes, num_rows * (number + 1) // num_passes
            x_block, place = x + 4 * (row * depth + k), y + 4 * row * y_stride
            panel_tile(end - row, block, x_block, depth, size, place, y_stride, k == 0, ahead, speed)
            ahead += speed * size


@njit("void(int64,int64,int64,int64,int64,int64,int64,int64)", cache=True, nogil=True)
def multiply(x, w, y, num_rows, depth, num_outputs, start, following):
    """The outputs of the panel from `start` on, of at most ROWS rows; x, w, y are addresses.

    Reads ahead from panel to panel: `following` is the first output of the one that will be next.
    """
    if num_rows == 0:
        return
    panel, width = w + 4 * start * depth, min(PANEL, num_outputs - start)
    ahead = w + 4 * following * depth if following < num_outputs else panel
    if width == PANEL:
        _multiply_panel(x, panel, y + 4 * start, num_rows, depth, num_outputs, ahead)
        return
    room = _room()
    _multiply_panel(x, panel, room, num_rows, depth, PANEL, ahead)
    for row in range(num_rows):
        y_N, sum_N = floats(y + 4 * (row * num_outputs + start), width), floats(room + 4 * row * PANEL, width)
        for n in range(width):
            y_N[n] = sum_N[n]


@njit("void(int64,int64,int64,int64,int64,int64)", cache=True, nogil=True, fastmath=True)
def add_bias(y, bias, num_rows, num_outputs, start, stop):
    bias_N = floats(bias, num_outputs)[start:stop]
    for row in range(num_rows):
        y_N = floats(y + 4 * row * num_outputs, num_outputs)[start:stop]
        for n in range(len(y_N)):
            y_N[n] += bias_N[n]


@cfunc(TASK, cache=True)
def _task(data):
    a = carray(data, (8,), int64)  # counter, step, x, panels, bias, y, K, N
    num_rows, depth, num_outputs = words(a[1], 1)[0], a[6], a[7]
    num_blocks = max(1, (num_rows + ROWS - 1) // ROWS)
    while True:
        item = claim(data)
        start, block = item // num_blocks * CHUNK, item % num_blocks
        if start >= num_outputs:
            return
        stop = min(start + CHUNK, num_outputs)
        row, end = num_rows * block // num_blocks, num_rows * (block + 1) // num_blocks
        x, y = a[2] + 4 * row * depth, a[5] + 4 * row * num_outputs
        for n in range(start, stop, PANEL):
            # After the last panel the first that no thread has claimed yet is likely to be next.
            following = n + PANEL if n + PANEL < stop else a[0] // num_blocks * CHUNK
            multiply(x, a[3], y, end - row, depth, num_outputs, n, following)
        if a[4] != 0:
            add_bias(y, a[4], end - row, num_outputs, start, stop)


def linear_call(
    step: Step, x_MK: torch.Tensor, weights: Panels, bias_N: torch.Tensor | None, *, out_MN: torch.Tensor
) -> Call:
    """Multiplies as many rows as the step has tokens."""
    num_outputs, depth = weights.num_outputs, weights.depth
    if x_MK.shape[1] != depth or out_MN.shape[1] != num_outputs:
        raise ValueError(
            f"w {[num_outputs, depth]} does not fit x {list(x_MK.shape)} and y {list(out_MN.shape)}"
        )
    return bind(_task.address, step, x_MK, weights.panels_EJKP, bias_N, out_MN, depth, num_outputs)


def linear(x_MK: torch.Tensor, weights: Panels, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x w^T + bias of any number of rows."""
    out_MN, step = x_MK.new_empty(len(x_MK), weights.num_outputs), Step()
    step.fill(len(x_MK))
    Program([linear_call(step, x_MK.contiguous(), weights, bias_N, out_MN=out_MN)]).run()
    return out_MN
