"""The experts of a mixture: y_t = sum_k weight_tk down_e(silu(gate_e x_t) * up_e x_t), e = expert_tk.

T tokens, K active experts per token, S = T K rows sorted by expert, E experts, D channels, I expert width, W = 2I.
gate_up_EWD holds all I gate rows of an expert, then its up rows; down_EDI its [D, I] output matrix.
Five tasks: gather, products, gate, products, combine. With int8 weights rows are quantized before either product
(`kernels.int8_linear`).
"""

import torch
from numba import carray, cfunc, int64, njit

from kernels import silu_mul
from kernels.int8_linear import CHUNK as INT8_CHUNK
from kernels.int8_linear import ROWS as INT8_ROWS
from kernels.int8_linear import Int8Weights, int8_sizes
from kernels.int8_linear import multiply as int8_multiply
from kernels.int8_rows import Int8Rows, quantize_rows_call
from kernels.linear import CHUNK, ROWS, multiply
from kernels.panel_tile import PANEL
from kernels.panels import Panels
from kernels.route_experts import sort_by_expert
from kernels.team import TASK, Call, Program, Step, bind, claim, floats, words

_MIN_TEAM_TOKENS = 16


def reference(
    x_TD: torch.Tensor,
    gate_up_EWD: torch.Tensor,
    down_EDI: torch.Tensor,
    *,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
) -> torch.Tensor:
    y_TD = torch.zeros_like(x_TD)
    for expert in experts_TK.unique().tolist():
        token_S, choice_S = (experts_TK == expert).nonzero(as_tuple=True)
        act_SI = silu_mul.reference(x_TD[token_S] @ gate_up_EWD[expert].T)
        y_TD.index_add_(0, token_S, act_SI @ down_EDI[expert].T * weights_TK[token_S, choice_S, None])
    return y_TD


@cfunc(TASK, cache=True)
def _gather_task(data):
    a = carray(data, (7,), int64)  # counter, step, x, places, x sorted, D, K
    num_tokens, width, num_active = words(a[1], 1)[0], a[5], a[6]
    while True:
        token = claim(data)
        if token >= num_tokens:
            return
        x_D, places_K = (
            floats(a[2] + 4 * token * width, width),
            words(a[3] + 8 * token * num_active, num_active),
        )
        for place in places_K:
            row_D = floats(a[4] + 4 * place * width, width)
            for d in range(width):
                row_D[d] = x_D[d]


@njit("UniTuple(int64,5)(int64, int64[::1], int64, int64)", cache=True, nogil=True)
def _share(item, starts, chunk, num_outputs):
    """(expert, its rows: first, end; outputs: start, stop) of a work item; behind the last one the expert is E."""
    num_experts, num_chunks = len(starts) - 1, (num_outputs + chunk - 1) // chunk
    expert, start = item // num_chunks, item % num_chunks * chunk
    if expert >= num_experts:
        return num_experts, 0, 0, 0, 0
    return expert, starts[expert], starts[expert + 1], start, min(start + chunk, num_outputs)


@cfunc(TASK, cache=True)
def _products_task(data):
    a = carray(data, (9,), int64)  # counter, step, x sorted, w, y sorted, starts, E, depth, outputs
    num_experts, depth, num_outputs = a[6], a[7], a[8]
    starts = words(a[5], num_experts + 1)
    while True:
        expert, first, end, start, stop = _share(claim(data), starts, CHUNK, num_outputs)
        if expert == num_experts:
            return
        w = a[3] + 4 * expert * depth * ((num_outputs + PANEL - 1) // PANEL * PANEL)
        for row in range(first, end, ROWS):
            x, y = a[2] + 4 * row * depth, a[4] + 4 * row * num_outputs
            for n in range(start, stop, PANEL):
                following = n + PANEL if n + PANEL < stop else n
                multiply(x, w, y, min(ROWS, end - row), depth, num_outputs, n, following)


@cfunc(TASK, cache=True)
def _int8_products_task(data):
    # counter, step, q, x scales, offsets, w, w scales, y, starts, E, depth, outputs
    a = carray(data, (12,), int64)
    num_experts, depth, num_outputs = a[9], a[10], a[11]
    stride, width = int8_sizes(depth, num_outputs)
    starts = words(a[8], num_experts + 1)
    while True:
        expert, first, end, start, stop = _share(claim(data), starts, INT8_CHUNK, num_outputs)
        if expert == num_experts:
            return
        w = (a[5] + expert * stride * width, a[6] + 4 * expert * width)
        for row in range(first, end, INT8_ROWS):
            x, y = (a[2] + stride * row, a[3] + 4 * row, a[4] + 4 * row), a[7] + 4 * row * num_outputs
            int8_multiply(x, w, y, min(INT8_ROWS, end - row), depth, num_outputs, start, stop)


def _products(
    step: Step,
    x_SK: torch.Tensor,
    weights: Panels | Int8Weights,
    starts: torch.Tensor,
    *,
    out_SN: torch.Tensor,
    num_active: int,
) -> list[Call]:
    """Each expert's rows with its matrix."""
    sizes = (len(starts) - 1, x_SK.shape[1], out_SN.shape[1])
    if isinstance(weights, Panels):
        return [bind(_products_task.address, step, x_SK, weights.panels_EJKP, out_SN, starts, *sizes)]
    rows = Int8Rows(*x_SK.shape)
    x, w = (rows.q_MP, rows.scale_M, rows.offset_M), (weights.packed, weights.scale_EN)
    return [
        quantize_rows_call(step, x_SK, rows, rows_per_token=num_active),
        bind(_int8_products_task.address, step, *x, *w, out_SN, starts, *sizes),
    ]


@njit("void(float32[::1], float32, float32[::1])", cache=True, nogil=True, fastmath=True)
def _add_scaled(y_D, weight, row_D):
    for d in range(len(y_D)):
        y_D[d] += weight * row_D[d]


@cfunc(TASK, cache=True)
def _combine_task(data):
    a = carray(data, (8,), int64)  # counter, step, y sorted, places, weights, y, D, K
    num_tokens, width, num_active = words(a[1], 1)[0], a[6], a[7]
    while True:
        token = claim(data)
        if token >= num_tokens:
            return
        y_D = floats(a[5] + 4 * token * width, width)
        places_K = words(a[3] + 8 * token * num_active, num_active)
        weights_K = floats(a[4] + 4 * token * num_active, num_active)
        y_D[:] = 0
        for k in range(num_active):
            _add_scaled(y_D, weights_K[k], floats(a[2] + 4 * places_K[k] * width, width))


def expert_mlp_calls(
    step: Step,
    x_TD: torch.Tensor,
    gate_up: Panels | Int8Weights,
    down: Panels | Int8Weights,
    *,
    weights_TK: torch.Tensor,
    places_TK: torch.Tensor,
    starts: torch.Tensor,
    out_TD: torch.Tensor,
) -> list[Call]:
    """For tokens routed by `kernels.route_experts.route_experts_call`."""
    (max_tokens, num_active), hidden, width = places_TK.shape, x_TD.shape[1], down.depth
    max_rows, few = max_tokens * num_active, _MIN_TEAM_TOKENS
    x_SD, gate_up_SW = x_TD.new_empty(max_rows, hidden), x_TD.new_empty(max_rows, 2 * width)
    act_SI, y_SD = x_TD.new_empty(max_rows, width), x_TD.new_empty(max_rows, hidden)
    return [
        bind(_gather_task.address, step, x_TD, places_TK, x_SD, hidden, num_active, min_team_tokens=few),
        *_products(step, x_SD, gate_up, starts, out_SN=gate_up_SW, num_active=num_active),
        silu_mul.silu_mul_call(step, gate_up_SW, out_TI=act_SI, rows_per_token=num_active),
        *_products(step, act_SI, down, starts, out_SN=y_SD, num_active=num_active),
        bind(
            _combine_task.address, step, y_SD, places_TK, weights_TK, out_TD, hidden, num_active,
            min_team_tokens=few,
        ),
    ]  # fmt: skip


def expert_mlp(
    x_TD: torch.Tensor,
    gate_up: Panels | Int8Weights,
    down: Panels | Int8Weights,
    *,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
) -> torch.Tensor:
    """y [T, D] of any number of tokens."""
    places_TK, out_TD = torch.empty_like(experts_TK), torch.empty_like(x_TD)
    starts = torch.empty(down.num_experts + 1, dtype=torch.int64)
    sort_by_expert(experts_TK.flatten().numpy(), places_TK.view(-1).numpy(), starts.numpy())
    step = Step()
    step.fill(len(x_TD))
    Program(
        expert_mlp_calls(
            step, x_TD, gate_up, down, weights_TK=weights_TK, places_TK=places_TK, starts=starts,
            out_TD=out_TD,
        )
    ).run()  # fmt: skip
    return out_TD
