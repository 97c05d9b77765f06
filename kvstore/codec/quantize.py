"""KV to symbols and back: CacheGen's anchors and deltas, in one pass over the blocks.

A chunk's tokens are taken in groups of TOKENS_PER_ANCHOR. Of each group the first token is the anchor and is
quantised on its own; the others as what they differ from what the anchor lets expect. With x' for a quantised value:

    anchor    a' = mean + anchor_bin * round((a - mean) / anchor_bin)
    delta     x' = b + delta_bin * round((x - b) / delta_bin),   b = mean + alpha * (a' - mean)

all per channel. alpha = 1 is the paper's codec. A symbol is the rounded number plus MAX_STEPS; what is further away
than MAX_STEPS bins is cut, so bins must be wide enough for the outliers.

S slots, G groups (layer, keys or values, head), C channels of a head, A anchors, D deltas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kvstore.layout import ITEM_BYTES, KvLayout

TOKENS_PER_ANCHOR = 10
MAX_STEPS = 31
NUM_SYMBOLS = 2 * MAX_STEPS + 1  # 63: the entropy coder searches a table of that many in two registers

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_WORDS = {"float32": np.uint32, "bfloat16": np.uint16}
_FLOATS, _SYMBOLS = 4 * ["float32[:, ::1]"], 2 * ["uint8[:, :, ::1]"]
_SIGNATURES = [
    f"void({word}[:, :, :, ::1], int64[::1], int64, {', '.join([*_FLOATS, *_SYMBOLS])})"
    for word in ("uint32", "uint16")
]
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bins:
    """What quantising needs to know of each channel."""

    mean_GC: Floats
    alpha_GC: Floats
    anchor_bin_GC: Floats
    delta_bin_GC: Floats


def num_groups(layout: KvLayout) -> int:
    return layout.num_layers * 2 * layout.num_kv_heads


def make_room(layout: KvLayout, *, num_blocks: int) -> tuple[Bytes, Bytes]:
    """Arrays for the symbols of the anchors [G, A, C] and of the deltas [G, D, C] of so many blocks."""
    num_tokens = num_blocks * layout.block_size_tokens
    num_anchors = -(-num_tokens // TOKENS_PER_ANCHOR)
    groups, width = num_groups(layout), layout.head_dim
    return (
        np.empty((groups, num_anchors, width), np.uint8),
        np.empty((groups, num_tokens - num_anchors, width), np.uint8),
    )


def quantize(arena_SX: Bytes, slots: Sequence[int], bins: Bins, *, layout: KvLayout) -> tuple[Bytes, Bytes]:
    """The symbols of the anchors [G, A, C] and of the deltas [G, D, C] of the blocks in `slots`."""
    anchors, deltas = make_room(layout, num_blocks=len(slots))
    _quantize(
        *_blocks(arena_SX, slots, layout), bins.mean_GC, bins.alpha_GC, bins.anchor_bin_GC, bins.delta_bin_GC,
        anchors, deltas,
    )  # fmt: skip
    return anchors, deltas


def dequantize_(
    arena_SX: Bytes, slots: Sequence[int], symbols: tuple[Bytes, Bytes], bins: Bins, *, layout: KvLayout
) -> None:
    """Fills the blocks in `slots` from the symbols that `quantize` gave."""
    _dequantize(
        *_blocks(arena_SX, slots, layout), bins.mean_GC, bins.alpha_GC, bins.anchor_bin_GC, bins.delta_bin_GC,
        *symbols,
    )  # fmt: skip


def read_values(arena_SX: Bytes, slots: Sequence[int], *, layout: KvLayout) -> Floats:
    """The KV of the blocks in `slots`, [G, tokens, C] in float32."""
    words_SGBC, ids, shift = _blocks(arena_SX, slots, layout)
    wide = words_SGBC[ids].astype(np.uint32) << np.uint32(shift)
    values = wide.view(np.float32).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(values).reshape(values.shape[0], -1, layout.head_dim)


def write_values_(arena_SX: Bytes, slots: Sequence[int], values_GTC: Floats, *, layout: KvLayout) -> None:
    """Fills the blocks in `slots` from [G, tokens, C]; bfloat16 rounds to the nearest."""
    words_SGBC, ids, shift = _blocks(arena_SX, slots, layout)
    bits = np.ascontiguousarray(values_GTC, np.float32).view(np.uint32)
    if shift:
        bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    shape = (bits.shape[0], len(ids), layout.block_size_tokens, layout.head_dim)
    words_SGBC[ids] = bits.reshape(shape).transpose(1, 0, 2, 3).astype(words_SGBC.dtype)


def _blocks(
    arena_SX: Bytes, slots: Sequence[int], layout: KvLayout
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
    """The arena as words [S, G, B, C], the slots, and how far a word is from the left end of a float32."""
    if arena_SX.ndim != 2 or arena_SX.shape[1] != layout.block_bytes or not arena_SX.flags.c_contiguous:
        raise ValueError(f"an arena is contiguous [slots, {layout.block_bytes} bytes], got {arena_SX.shape}")
    ids = np.array(slots, np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < len(arena_SX)):
        raise ValueError(f"slots must be in 0..{len(arena_SX) - 1}, got {slots}")
    shape = (len(arena_SX), num_groups(layout), layout.block_size_tokens, layout.head_dim)
    words_SGBC = arena_SX.view(_WORDS[layout.dtype]).reshape(shape)
    return words_SGBC, ids, 32 - 8 * ITEM_BYTES[layout.dtype]


@njit(inline="always")
def _symbol(value: Any, scale: Any) -> Any:
    """Not round(): adding first makes it a cut of positive numbers, which is one vector instruction."""
    steps = value * scale + np.float32(MAX_STEPS + 0.5)
    steps = steps if steps > np.float32(0.0) else np.float32(0.0)  # NaN too
    last = np.float32(2 * MAX_STEPS)
    return np.uint8(np.int32(steps if steps < last else last))


@njit(_SIGNATURES, **_OPTIONS)
def _quantize(
    words_SGBC: Any, slots: Any, shift: int, mean_GC: Any, alpha_GC: Any, anchor_bin_GC: Any,
    delta_bin_GC: Any, anchors_GAC: Any, deltas_GDC: Any,
) -> None:  # fmt: skip
    _, num_groups, block_size, width = words_SGBC.shape
    num_tokens = len(slots) * block_size
    values, base = np.empty(width, np.float32), np.empty(width, np.float32)
    bits = values.view(np.uint32)
    for g in range(num_groups):
        mean, alpha, anchor_bin, delta_bin = mean_GC[g], alpha_GC[g], anchor_bin_GC[g], delta_bin_GC[g]
        anchor_scale = np.float32(1.0) / anchor_bin
        delta_scale = np.float32(1.0) / delta_bin
        for t in range(num_tokens):
            words = words_SGBC[slots[t // block_size], g, t % block_size]
            group = t // TOKENS_PER_ANCHOR
            for c in range(width):
                bits[c] = np.uint32(words[c]) << np.uint32(shift)
            if t % TOKENS_PER_ANCHOR == 0:
                out = anchors_GAC[g, group]
                for c in range(width):
                    symbol = _symbol(values[c] - mean[c], anchor_scale[c])
                    out[c] = symbol
                    steps = np.float32(np.int32(symbol) - np.int32(MAX_STEPS))
                    base[c] = mean[c] + alpha[c] * (steps * anchor_bin[c])
            else:
                out = deltas_GDC[g, t - group - 1]
                for c in range(width):
                    out[c] = _symbol(values[c] - base[c], delta_scale[c])


@njit(_SIGNATURES, **_OPTIONS)
def _dequantize(
    words_SGBC: Any, slots: Any, shift: int, mean_GC: Any, alpha_GC: Any, anchor_bin_GC: Any,
    delta_bin_GC: Any, anchors_GAC: Any, deltas_GDC: Any,
) -> None:  # fmt: skip
    _, num_groups, block_size, width = words_SGBC.shape
    num_tokens = len(slots) * block_size
    values, base = np.empty(width, np.float32), np.empty(width, np.float32)
    bits = values.view(np.uint32)
    for g in range(num_groups):
        mean, alpha, anchor_bin, delta_bin = mean_GC[g], alpha_GC[g], anchor_bin_GC[g], delta_bin_GC[g]
        for t in range(num_tokens):
            words = words_SGBC[slots[t // block_size], g, t % block_size]
            group = t // TOKENS_PER_ANCHOR
            if t % TOKENS_PER_ANCHOR == 0:
                symbols = anchors_GAC[g, group]
                for c in range(width):
                    moved = np.float32(np.int32(symbols[c]) - np.int32(MAX_STEPS)) * anchor_bin[c]
                    values[c] = mean[c] + moved
                    base[c] = mean[c] + alpha[c] * moved
            else:
                symbols = deltas_GDC[g, t - group - 1]
                for c in range(width):
                    steps = np.float32(np.int32(symbols[c]) - np.int32(MAX_STEPS))
                    values[c] = base[c] + steps * delta_bin[c]
            if shift == 0:
                for c in range(width):
                    words[c] = bits[c]
            else:
                for c in range(width):  # to the nearest bfloat16, ties to even
                    rounded = bits[c] + np.uint32(0x7FFF) + ((bits[c] >> np.uint32(16)) & np.uint32(1))
                    words[c] = rounded >> np.uint32(16)
