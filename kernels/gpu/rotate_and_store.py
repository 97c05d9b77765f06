"""Queries and keys get their norm and their rotation; keys and values go to their pages. One pass over a step's tokens.

For each head x of C channels with halves (a, b), position p and frequencies f: x = norm(x) where the model has such
norms, then (a, b) -> (a cos(pf) - b sin(pf), b cos(pf) + a sin(pf)) (Su et al., 2021, in Hugging Face's half split).
Pages of int8 or fp8 get x / scale, scale = max |x| / 127 or 448 of each token and head, and the scale.

T tokens, H query heads, G key/value heads, N = (H + 2G) C, P pages, B tokens per page, X positions, F = C/2 (FP: up to
the next power of two). A slot is page * B + place in the page; pages_P2GBC holds keys at index 0 and values at index 1.
A program takes HEADS heads of one token.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu import rms_norm
from kernels.gpu.paged_kv import SCALED

_HEADS, _WARPS = 8, 2
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """What all layers share (cos, sin) and what a layer may have (the norms of queries and keys)."""

    cos_XF: torch.Tensor
    sin_XF: torch.Tensor
    q_norm_C: torch.Tensor | None
    k_norm_C: torch.Tensor | None
    eps: float


def reference_(
    qkv_TN: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    scales_P2GB: torch.Tensor | None,
    rotation: Rotation,
    *,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    _, _, num_kv_heads, block, head_dim = pages_P2GBC.shape
    heads_TMC = qkv_TN.view(len(qkv_TN), -1, head_dim)
    q_THC, kv_TGC = heads_TMC[:, : -2 * num_kv_heads], heads_TMC[:, -2 * num_kv_heads :].clone()
    cos_T1F, sin_T1F = (x_XF[positions_T].unsqueeze(1) for x_XF in (rotation.cos_XF, rotation.sin_XF))
    for x, norm_C in ((q_THC, rotation.q_norm_C), (kv_TGC[:, :num_kv_heads], rotation.k_norm_C)):
        normed = x if norm_C is None else rms_norm.reference(x, norm_C, eps=rotation.eps)
        a, b = normed.float().chunk(2, dim=-1)
        x.copy_(torch.cat((a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F), dim=-1))
    page_T, place_T = slots_T // block, slots_T % block
    stored = kv_TGC.float()
    if scales_P2GB is not None:
        scale_TG = stored.abs().amax(-1) / _LARGEST[pages_P2GBC.dtype]
        scales_P2GB[page_T, :, :, place_T] = scale_TG.unflatten(1, (2, -1))
        stored = stored / torch.where(scale_TG == 0, 1.0, scale_TG).unsqueeze(-1)
        stored = (stored + 0.5).floor() if pages_P2GBC.dtype == torch.int8 else stored
    numbers_T2GC = stored.to(pages_P2GBC.dtype).unflatten(1, (2, -1))
    if scales_P2GB is None:
        pages_P2GBC[page_T, :, :, place_T] = numbers_T2GC
    else:  # as bytes: not every torch can write fp8 by index
        pages_P2GBC.view(torch.uint8)[page_T, :, :, place_T] = numbers_T2GC.view(torch.uint8)


@triton.jit
def _normed(a_HF, b_HF, q_norm, k_norm, is_query_H, is_value_H, eps, f, C: tl.constexpr):
    """Both halves of queries and keys; values as they were."""
    wide_a_HF, wide_b_HF = a_HF.to(tl.float32), b_HF.to(tl.float32)
    scale_H1 = tl.rsqrt(tl.sum(wide_a_HF * wide_a_HF + wide_b_HF * wide_b_HF, 1) / C + eps)[:, None]
    weight_HF = _weight(q_norm, k_norm, is_query_H, f, C)
    normed_a_HF = weight_HF * (wide_a_HF * scale_H1).to(a_HF.dtype)
    weight_HF = _weight(q_norm + C // 2, k_norm + C // 2, is_query_H, f, C)
    normed_b_HF = weight_HF * (wide_b_HF * scale_H1).to(b_HF.dtype)
    a_HF = tl.where(is_value_H[:, None], a_HF, normed_a_HF.to(a_HF.dtype))
    b_HF = tl.where(is_value_H[:, None], b_HF, normed_b_HF.to(b_HF.dtype))
    return a_HF, b_HF


@triton.jit
def _weight(q_norm, k_norm, is_query_H, f, C: tl.constexpr):
    q_norm_F = tl.load(q_norm + f, mask=f < C // 2, other=0.0).to(tl.float32)
    k_norm_F = tl.load(k_norm + f, mask=f < C // 2, other=0.0).to(tl.float32)
    return tl.where(is_query_H[:, None], q_norm_F[None, :], k_norm_F[None, :])


@triton.jit
def _kernel(
    qkv, pages, scales, cos, sin, q_norm, k_norm, positions, slots, eps, largest,
    H: tl.constexpr, G: tl.constexpr, B: tl.constexpr, C: tl.constexpr, FP: tl.constexpr,
    HEADS: tl.constexpr, HAS_NORMS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    f = tl.arange(0, FP)
    F: tl.constexpr = C // 2
    is_query_H, is_value_H = h < H, h >= H + G
    exists_HF = (h < H + 2 * G)[:, None] & (f < F)[None, :]
    place_HF = qkv + token * ((H + 2 * G) * C) + h[:, None] * C + f[None, :]
    a_HF = tl.load(place_HF, mask=exists_HF, other=0.0)
    b_HF = tl.load(place_HF + F, mask=exists_HF, other=0.0)
    dtype = a_HF.dtype
    if HAS_NORMS:
        a_HF, b_HF = _normed(a_HF, b_HF, q_norm, k_norm, is_query_H, is_value_H, eps, f, C)
    a_HF, b_HF = a_HF.to(tl.float32), b_HF.to(tl.float32)
    position = tl.load(positions + token).to(tl.int64)
    cos_F = tl.load(cos + position * F + f, mask=f < F, other=0.0)
    sin_F = tl.load(sin + position * F + f, mask=f < F, other=0.0)
    cos_HF = tl.where(is_value_H[:, None], 1.0, cos_F[None, :])
    sin_HF = tl.where(is_value_H[:, None], 0.0, sin_F[None, :])
    # Rounded as a query is, so that pages of any kind stem from the same keys.
    rotated_a_HF = (a_HF * cos_HF - b_HF * sin_HF).to(dtype)
    rotated_b_HF = (b_HF * cos_HF + a_HF * sin_HF).to(dtype)
    tl.store(place_HF, rotated_a_HF, mask=exists_HF & is_query_H[:, None])
    tl.store(place_HF + F, rotated_b_HF, mask=exists_HF & is_query_H[:, None])
    slot = tl.load(slots + token).to(tl.int64)
    row_H = (slot // B * (2 * G) + h - H) * B + slot % B
    target_HF = pages + row_H[:, None] * C + f[None, :]
    is_kv_HF = exists_HF & (h >= H)[:, None]
    if SCALED:
        wide_a_HF, wide_b_HF = rotated_a_HF.to(tl.float32), rotated_b_HF.to(tl.float32)
        scale_H = tl.max(tl.maximum(tl.abs(wide_a_HF), tl.abs(wide_b_HF)), 1) / largest
        tl.store(scales + row_H, scale_H, mask=(h >= H) & (h < H + 2 * G))
        divisor_H = tl.where(scale_H == 0, 1.0, scale_H)
        wide_a_HF, wide_b_HF = wide_a_HF / divisor_H[:, None], wide_b_HF / divisor_H[:, None]
        if pages.dtype.element_ty == tl.int8:
            wide_a_HF, wide_b_HF = tl.floor(wide_a_HF + 0.5), tl.floor(wide_b_HF + 0.5)
        tl.store(target_HF, wide_a_HF.to(pages.dtype.element_ty), mask=is_kv_HF)
        tl.store(target_HF + F, wide_b_HF.to(pages.dtype.element_ty), mask=is_kv_HF)
    else:
        tl.store(target_HF, rotated_a_HF, mask=is_kv_HF)
        tl.store(target_HF + F, rotated_b_HF, mask=is_kv_HF)


def rotate_and_store_(
    qkv_TN: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    scales_P2GB: torch.Tensor | None,
    rotation: Rotation,
    *,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Overwrites the queries in `qkv_TN` by their rotated form, and writes keys and values to their slots only."""
    num_tokens, width = qkv_TN.shape
    _, _, num_kv_heads, block, head_dim = pages_P2GBC.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    if num_heads < 1 or width % head_dim or head_dim % 2:
        raise ValueError(f"{width} channels are not heads of {head_dim} beside 2 * {num_kv_heads}")
    if not pages_P2GBC.is_contiguous() or not qkv_TN.is_contiguous():
        raise ValueError("pages and qkv must be contiguous")
    if (scales_P2GB is not None) != (pages_P2GBC.dtype in SCALED):
        raise ValueError(f"pages of {pages_P2GBC.dtype} and scales: only int8 and fp8 have them")
    if (rotation.q_norm_C is None) != (rotation.k_norm_C is None):
        raise ValueError("queries and keys both have norms, or none has")
    if num_tokens:
        _kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS))](
            qkv_TN, pages_P2GBC, scales_P2GB, rotation.cos_XF, rotation.sin_XF, rotation.q_norm_C,
            rotation.k_norm_C, positions_T, slots_T, rotation.eps, _LARGEST.get(pages_P2GBC.dtype, 1.0),
            H=num_heads, G=num_kv_heads, B=block, C=head_dim, FP=triton.next_power_of_2(head_dim // 2),
            HEADS=_HEADS, HAS_NORMS=rotation.q_norm_C is not None, SCALED=scales_P2GB is not None,
            num_warps=_WARPS,
        )  # fmt: skip
