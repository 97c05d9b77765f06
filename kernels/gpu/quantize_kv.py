"""KV to symbols and back: the codec's anchors and deltas, on blocks in staging, bit for bit as on the CPU.

Of each TOKENS_PER_ANCHOR tokens the first is the anchor a, quantised on its own; the others x by what they differ from
what it lets expect (Liu et al., "CacheGen", 2024). With x' for a quantised value, per channel:

    anchor    a' = mean + anchor_bin * round((a - mean) / anchor_bin)
    delta     x' = b + delta_bin * round((x - b) / delta_bin),   b = mean + alpha * (a' - mean)

A symbol is the rounded number plus MAX_STEPS; what is further away than MAX_STEPS bins is cut, and NaN is symbol 0.
Nothing may be fused into one rounding, or a GPU's bits would not be the CPU's.

N blocks, G groups (layer, keys or values, head), B tokens of a block, C channels of a head, A anchors, D deltas.
staging_NGBC holds a block's groups one after the other, as `copy_pages` fills it; symbols are uint8.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TOKENS_PER_ANCHOR = 10
MAX_STEPS = 31
_PADDED_TOKENS = 16
_WARPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Bins:
    """What quantising needs to know of each channel, float32 [G, C]."""

    mean_GC: torch.Tensor
    alpha_GC: torch.Tensor
    anchor_bin_GC: torch.Tensor
    delta_bin_GC: torch.Tensor


def num_anchors(num_tokens: int) -> int:
    return -(-num_tokens // TOKENS_PER_ANCHOR)


def _symbols(x: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    steps = (x * (1.0 / bins) + (MAX_STEPS + 0.5)).nan_to_num(nan=0.0).clamp(0, 2 * MAX_STEPS)
    return steps.to(torch.uint8)  # which cuts


def reference_quantize(staging_NGBC: torch.Tensor, bins: Bins) -> tuple[torch.Tensor, torch.Tensor]:
    x_GTC = staging_NGBC.float().transpose(0, 1).flatten(1, 2)
    mean_G1C, alpha_G1C = bins.mean_GC.unsqueeze(1), bins.alpha_GC.unsqueeze(1)
    anchors_GAC = _symbols(x_GTC[:, ::TOKENS_PER_ANCHOR] - mean_G1C, bins.anchor_bin_GC.unsqueeze(1))
    steps_GAC = anchors_GAC.float() - MAX_STEPS
    base_GAC = mean_G1C + alpha_G1C * (steps_GAC * bins.anchor_bin_GC.unsqueeze(1))
    t = torch.arange(x_GTC.shape[1], device=x_GTC.device)
    delta_T = t[t % TOKENS_PER_ANCHOR != 0]
    difference_GDC = x_GTC[:, delta_T] - base_GAC[:, delta_T // TOKENS_PER_ANCHOR]
    return anchors_GAC, _symbols(difference_GDC, bins.delta_bin_GC.unsqueeze(1))


def reference_dequantize(
    anchors_GAC: torch.Tensor, deltas_GDC: torch.Tensor, bins: Bins, *, block: int
) -> torch.Tensor:
    """[N, G, B, C] in float32."""
    num_groups, _, width = anchors_GAC.shape
    num_tokens = anchors_GAC.shape[1] + deltas_GDC.shape[1]
    moved_GAC = (anchors_GAC.float() - MAX_STEPS) * bins.anchor_bin_GC.unsqueeze(1)
    base_GAC = bins.mean_GC.unsqueeze(1) + bins.alpha_GC.unsqueeze(1) * moved_GAC
    t = torch.arange(num_tokens, device=anchors_GAC.device)
    delta_T = t[t % TOKENS_PER_ANCHOR != 0]
    x_GTC = torch.empty(num_groups, num_tokens, width, device=anchors_GAC.device)
    x_GTC[:, ::TOKENS_PER_ANCHOR] = bins.mean_GC.unsqueeze(1) + moved_GAC
    steps_GDC = (deltas_GDC.float() - MAX_STEPS) * bins.delta_bin_GC.unsqueeze(1)
    x_GTC[:, delta_T] = base_GAC[:, delta_T // TOKENS_PER_ANCHOR] + steps_GDC
    return x_GTC.view(num_groups, -1, block, width).transpose(0, 1)


@triton.jit
def _symbol(x, bins, MAX_STEPS: tl.constexpr):
    """Not round(): adding first makes it a cut of positive numbers."""
    steps = x * (1.0 / bins) + (MAX_STEPS + 0.5)
    steps = tl.where(steps > 0.0, steps, 0.0)  # NaN too
    return tl.where(steps < 2.0 * MAX_STEPS, steps, 2.0 * MAX_STEPS).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens", "num_anchors", "num_groups"])
def _kernel(
    staging, anchors, deltas, means, alphas, anchor_bins, delta_bins, num_tokens, num_anchors, num_groups,
    B: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr,
    MAX_STEPS: tl.constexpr, QUANTIZES: tl.constexpr,
):  # fmt: skip
    anchor, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CP)
    is_channel_C = c < C
    mean_C = tl.load(means + g * C + c, mask=is_channel_C, other=0.0)
    alpha_C = tl.load(alphas + g * C + c, mask=is_channel_C, other=0.0)
    anchor_bin_C = tl.load(anchor_bins + g * C + c, mask=is_channel_C, other=1.0)
    delta_bin_C = tl.load(delta_bins + g * C + c, mask=is_channel_C, other=1.0)
    first = anchor * TOKENS
    block_x = staging + (first // B * num_groups + g) * (B * C) + first % B * C + c
    anchor_C = anchors + (g * num_anchors + anchor) * C + c
    if QUANTIZES:
        x_C = tl.load(block_x, mask=is_channel_C, other=0.0).to(tl.float32)
        symbol_C = _symbol(x_C - mean_C, anchor_bin_C, MAX_STEPS)
        tl.store(anchor_C, symbol_C.to(tl.uint8), mask=is_channel_C)
    else:
        symbol_C = tl.load(anchor_C, mask=is_channel_C, other=0).to(tl.int32)
    moved_C = (symbol_C - MAX_STEPS).to(tl.float32) * anchor_bin_C
    if not QUANTIZES:
        tl.store(block_x, (mean_C + moved_C).to(staging.dtype.element_ty), mask=is_channel_C)
    base_C = mean_C + alpha_C * moved_C
    i = tl.arange(0, PADDED)
    t = first + 1 + i
    exists_DC = ((i < TOKENS - 1) & (t < num_tokens))[:, None] & is_channel_C[None, :]
    place_DC = (t // B * num_groups + g) * (B * C) + t % B * C
    place_DC = staging + place_DC[:, None] + c[None, :]
    delta_DC = deltas + (g * (num_tokens - num_anchors) + t - anchor - 1)[:, None] * C + c[None, :]
    if QUANTIZES:
        x_DC = tl.load(place_DC, mask=exists_DC, other=0.0).to(tl.float32)
        symbol_DC = _symbol(x_DC - base_C[None, :], delta_bin_C[None, :], MAX_STEPS)
        tl.store(delta_DC, symbol_DC.to(tl.uint8), mask=exists_DC)
    else:
        symbol_DC = tl.load(delta_DC, mask=exists_DC, other=0).to(tl.int32)
        x_DC = base_C[None, :] + (symbol_DC - MAX_STEPS).to(tl.float32) * delta_bin_C[None, :]
        tl.store(place_DC, x_DC.to(staging.dtype.element_ty), mask=exists_DC)


def quantize(staging_NGBC: torch.Tensor, bins: Bins) -> tuple[torch.Tensor, torch.Tensor]:
    """The symbols of the anchors [G, A, C] and of the deltas [G, D, C]."""
    num_blocks, num_groups, block, width = staging_NGBC.shape
    num_tokens = num_blocks * block
    anchors_GAC = staging_NGBC.new_empty(num_groups, num_anchors(num_tokens), width, dtype=torch.uint8)
    deltas_GDC = anchors_GAC.new_empty(num_groups, num_tokens - anchors_GAC.shape[1], width)
    _launch(staging_NGBC, anchors_GAC, deltas_GDC, bins, quantizes=True)
    return anchors_GAC, deltas_GDC


def dequantize_(
    staging_NGBC: torch.Tensor, anchors_GAC: torch.Tensor, deltas_GDC: torch.Tensor, bins: Bins
) -> None:
    """Fills staging with what the symbols stand for."""
    num_blocks, num_groups, block, width = staging_NGBC.shape
    num = num_anchors(num_blocks * block)
    wanted = (num_groups, num, width), (num_groups, num_blocks * block - num, width)
    if (anchors_GAC.shape, deltas_GDC.shape) != wanted:
        got = [list(anchors_GAC.shape), list(deltas_GDC.shape)]
        raise ValueError(f"symbols of {num_blocks} blocks are {wanted}, got {got}")
    _launch(staging_NGBC, anchors_GAC, deltas_GDC, bins, quantizes=False)


def _launch(
    staging_NGBC: torch.Tensor,
    anchors_GAC: torch.Tensor,
    deltas_GDC: torch.Tensor,
    bins: Bins,
    *,
    quantizes: bool,
) -> None:
    num_blocks, num_groups, block, width = staging_NGBC.shape
    tables = bins.mean_GC, bins.alpha_GC, bins.anchor_bin_GC, bins.delta_bin_GC
    if any(table.shape != (num_groups, width) or table.dtype != torch.float32 for table in tables):
        raise ValueError(f"bins must be float32 {[num_groups, width]}, got {list(bins.mean_GC.shape)}")
    if not staging_NGBC.is_contiguous():
        raise ValueError(f"staging must be contiguous, got strides {staging_NGBC.stride()}")
    if num_blocks:
        _kernel[(anchors_GAC.shape[1], num_groups)](
            staging_NGBC, anchors_GAC, deltas_GDC, *tables, num_blocks * block, anchors_GAC.shape[1], num_groups,
            B=block, C=width, CP=triton.next_power_of_2(width), TOKENS=TOKENS_PER_ANCHOR, PADDED=_PADDED_TOKENS,
            MAX_STEPS=MAX_STEPS, QUANTIZES=quantizes, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
