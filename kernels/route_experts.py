"""Which experts a token goes to: the K largest of softmax(logits), in fp32, optionally rescaled to sum to one.

T tokens, E experts, K active experts per token. The compiled form also sorts the T K choices by expert, so that each
expert computes one run of rows: choice (t, k) is row places_TK[t, k], expert e has rows starts[e] to starts[e + 1] - 1.
"""

import numpy as np
import torch
from numba import carray, cfunc, int64, njit

from kernels.exponential import exponential
from kernels.team import TASK, Call, Program, Step, bind, claim, floats, words


def reference(
    logits_TE: torch.Tensor, *, num_active: int, normalizes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, K] in the dtype of the logits, experts [T, K] int64), largest first."""
    weights_TK, experts_TK = torch.topk(logits_TE.float().softmax(-1), num_active, dim=-1)
    if normalizes:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK.to(logits_TE.dtype), experts_TK


@njit("void(float32[::1], float32[::1], int64[::1], int64)", cache=True, nogil=True, error_model="numpy")
def _route(logits_E, weights_K, experts_K, normalizes):
    """Destroys the logits."""
    top, total = logits_E[0], np.float32(0.0)
    for e in range(len(logits_E)):
        top = max(top, logits_E[e])
    for e in range(len(logits_E)):
        total += exponential(logits_E[e] - top)
    chosen = np.float32(0.0)
    for k in range(len(experts_K)):
        best = 0
        for e in range(len(logits_E)):
            if logits_E[e] > logits_E[best]:
                best = e
        experts_K[k], weights_K[k] = best, exponential(logits_E[best] - top)
        chosen += weights_K[k]
        logits_E[best] = -np.inf
    if normalizes:
        total = chosen
    for k in range(len(weights_K)):
        weights_K[k] /= total


@njit("void(int64[::1], int64[::1], int64[::1])", cache=True, nogil=True)
def sort_by_expert(experts_S, places_S, starts):
    starts[:] = 0
    for expert in experts_S:
        starts[expert + 1] += 1
    for e in range(1, len(starts)):
        starts[e] += starts[e - 1]
    # Counting sort: while filling, starts[e] is the next free row of e; shifted back after.
    for i in range(len(experts_S)):
        places_S[i] = starts[experts_S[i]]
        starts[experts_S[i]] += 1
    for e in range(len(starts) - 1, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0


@cfunc(TASK, cache=True)
def _task(data):
    a = carray(
        data, (10,), int64
    )  # counter, step, logits, weights, experts, places, starts, E, K, normalizes
    if claim(data) > 0:
        return
    num_tokens, num_experts, num_active = words(a[1], 1)[0], a[7], a[8]
    for token in range(num_tokens):
        logits_E = floats(a[2] + 4 * token * num_experts, num_experts)
        weights_K = floats(a[3] + 4 * token * num_active, num_active)
        _route(logits_E, weights_K, words(a[4] + 8 * token * num_active, num_active), a[9])
    num_choices = num_tokens * num_active
    sort_by_expert(words(a[4], num_choices), words(a[5], num_choices), words(a[6], num_experts + 1))


_NEVER = 2**62  # one thread routes the few tokens of a program's step faster than two start


def route_experts_call(
    step: Step,
    logits_TE: torch.Tensor,
    *,
    normalizes: bool,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    places_TK: torch.Tensor,
    starts: torch.Tensor,
) -> Call:
    """Destroys the logits; `starts` has E + 1 entries."""
    outputs = weights_TK, experts_TK, places_TK, starts
    sizes = logits_TE.shape[1], experts_TK.shape[1], int(normalizes)
    return bind(_task.address, step, logits_TE, *outputs, *sizes, min_team_tokens=_NEVER)


def route_experts(
    logits_TE: torch.Tensor, *, num_active: int, normalizes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, K], experts [T, K] int64), largest first; destroys the logits."""
    if logits_TE.dtype != torch.float32:
        return reference(logits_TE, num_active=num_active, normalizes=normalizes)
    num_tokens, num_experts = logits_TE.shape
    weights_TK = logits_TE.new_empty(num_tokens, num_active)
    experts_TK, places_TK = torch.empty(2, num_tokens, num_active, dtype=torch.int64)
    step = Step()
    step.fill(num_tokens)
    Program([
        route_experts_call(
            step, logits_TE, normalizes=normalizes, weights_TK=weights_TK, experts_TK=experts_TK,
            places_TK=places_TK, starts=torch.empty(num_experts + 1, dtype=torch.int64),
        )
    ]).run()  # fmt: skip
    return weights_TK, experts_TK
