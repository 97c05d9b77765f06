"""Queries and keys get their norm and their rotation; keys and values go to their pages. One pass over a step's tokens.

For each head x of C channels with halves (a, b), position p and frequencies f: x = norm(x) where the model has such
norms, then (a, b) -> (a cos(pf) - b sin(pf), b cos(pf) + a sin(pf)) (Su et al., 2021, in Hugging Face's half split).

T tokens, H query heads, G key/value heads, N = (H + 2G) C, P pages, B tokens per page, X positions, F = C/2.
A slot is page * B + place in the page; pages_P2GBC holds keys at index 0 and values at index 1.
"""

from dataclasses import dataclass

import torch
from numba import carray, cfunc, float64, int64, njit

from kernels import rms_norm
from kernels.team import TASK, Call, Program, Step, bind, claim, floats, words

_MIN_TEAM_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """What all layers share (cos, sin) and what a layer may have (the norms of queries and keys)."""

    cos_XF: torch.Tensor
    sin_XF: torch.Tensor
    q_norm_C: torch.Tensor | None
    k_norm_C: torch.Tensor | None
    eps: float


def reference(
    x_THC: torch.Tensor, positions_T: torch.Tensor, cos_XF: torch.Tensor, sin_XF: torch.Tensor
) -> torch.Tensor:
    """The rotated heads, computed in fp32, in the dtype of `x_THC`."""
    a, b = x_THC.float().chunk(2, dim=-1)
    cos_T1F, sin_T1F = cos_XF[positions_T].unsqueeze(1), sin_XF[positions_T].unsqueeze(1)
    return torch.cat((a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F), dim=-1).to(x_THC.dtype)


def reference_rotate_and_store_(
    qkv_TN: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    rotation: Rotation,
    *,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    _, _, num_kv_heads, block, head_dim = pages_P2GBC.shape
    heads_TMC = qkv_TN.view(qkv_TN.shape[0], -1, head_dim)
    q_THC, k_TGC = heads_TMC[:, : -2 * num_kv_heads], heads_TMC[:, -2 * num_kv_heads : -num_kv_heads]
    for x, norm_C in ((q_THC, rotation.q_norm_C), (k_TGC, rotation.k_norm_C)):
        normed = x if norm_C is None else rms_norm.reference(x, norm_C, eps=rotation.eps)
        x.copy_(reference(normed, positions_T, rotation.cos_XF, rotation.sin_XF))
    page_T, place_T = slots_T // block, slots_T % block
    pages_P2GBC[page_T, 0, :, place_T] = k_TGC
    pages_P2GBC[page_T, 1, :, place_T] = heads_TMC[:, -num_kv_heads:]


@njit("void(float32[::1], float32[::1], float32[::1], float32[::1])", cache=True, nogil=True, fastmath=True)
def _rotate(a_F, b_F, cos_F, sin_F):
    for f in range(len(a_F)):
        a, b = a_F[f], b_F[f]
        a_F[f] = a * cos_F[f] - b * sin_F[f]
        b_F[f] = b * cos_F[f] + a * sin_F[f]


@njit("void(float32[::1], float32[::1])", cache=True, nogil=True)
def _copy(source_C, target_C):
    for c in range(len(source_C)):
        target_C[c] = source_C[c]


@njit("void(int64[::1], int64, float64)", cache=True, nogil=True)
def _token(a, token, eps):
    num_heads, num_kv_heads, width, block = a[9], a[10], a[11], a[12]
    step, half = words(a[1], 3), width // 2
    position, slot = words(step[1], token + 1)[token], words(step[2], token + 1)[token]
    cos_F, sin_F = floats(a[4] + 4 * position * half, half), floats(a[5] + 4 * position * half, half)
    start = a[2] + 4 * token * (num_heads + 2 * num_kv_heads) * width
    for head in range(num_heads + num_kv_heads):
        address = start + 4 * head * width
        norm = a[6] if head < num_heads else a[7]
        if norm != 0:
            x_C = floats(address, width)
            rms_norm.norm_row(x_C, floats(norm, width), x_C, eps)
        _rotate(floats(address, half), floats(address + 4 * half, half), cos_F, sin_F)
    page, place = slot // block, slot % block
    for kv_head in range(2 * num_kv_heads):  # keys, then values, as a page has them
        target = a[3] + 4 * width * ((page * 2 * num_kv_heads + kv_head) * block + place)
        _copy(floats(start + 4 * (num_heads + kv_head) * width, width), floats(target, width))


@cfunc(TASK, cache=True)
def _task(data):
    a = carray(data, (13,), int64)  # counter, step, qkv, pages, cos, sin, q norm, k norm, eps, H, G, C, B
    eps, num_tokens = carray(data, (13,), float64)[8], words(a[1], 1)[0]
    while True:
        token = claim(data)
        if token >= num_tokens:
            return
        _token(a, token, eps)


def rotate_and_store_call(
    step: Step, qkv_TN: torch.Tensor, pages_P2GBC: torch.Tensor, rotation: Rotation
) -> Call:
    """Reads positions and slots of the step."""
    _, _, num_kv_heads, block, head_dim = pages_P2GBC.shape
    if not pages_P2GBC.is_contiguous() or not qkv_TN.is_contiguous():
        raise ValueError("pages and qkv must be contiguous")
    num_heads = qkv_TN.shape[1] // head_dim - 2 * num_kv_heads
    norms = rotation.q_norm_C, rotation.k_norm_C
    sizes = num_heads, num_kv_heads, head_dim, block
    arguments = (qkv_TN, pages_P2GBC, rotation.cos_XF, rotation.sin_XF, *norms, float(rotation.eps), *sizes)
    return bind(_task.address, step, *arguments, min_team_tokens=_MIN_TEAM_TOKENS)


def rotate_and_store_(
    qkv_TN: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    rotation: Rotation,
    *,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Overwrites queries and keys in `qkv_TN` by their rotated form and writes keys and values to their slots."""
    if qkv_TN.dtype != torch.float32:
        reference_rotate_and_store_(qkv_TN, pages_P2GBC, rotation, positions_T=positions_T, slots_T=slots_T)
        return
    step = Step()
    step.fill(len(qkv_TN), positions_T=positions_T, slots_T=slots_T)
    Program([rotate_and_store_call(step, qkv_TN, pages_P2GBC, rotation)]).run()
