"""KV to symbols and back: CacheGen's anchors and deltas, in one pass over the blocks.

A chunk's tokens are taken in groups of TOKENS_PER_ANCHOR. Of each group the first token is the anchor and is
quantised on its own; the others as what they differ from what the anchor lets expect. With x' for a quantised value:

    anchor    a' = mean + anchor_bin * round((a - mean) / anchor_bin)
    delta     x' = b + delta_bin * round((x - b) / delta_bin),   b = mean + alpha * (a' - mean)

all per channel. alpha = 1 is the paper's codec. A symbol is the rounded number plus MAX_STEPS; what is further away
than MAX_STEPS bins is cut, so bins must be wide enough for the outliers.

Blocks lie in slots: of an arena [S, X], which holds all layers of a block one after the other, or of any memory
[S, L, X] in which the bytes of a layer are contiguous, such as the pages of an engine.

S slots, L layers, N blocks, G groups (layer, keys or values, head), H groups of a layer, B tokens of a block,
C channels of a head, A anchors, D deltas, X bytes, W words of an item's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kvstore.codec.past_caches import LINE_BYTES, finish, write_
from kvstore.layout import ITEM_BYTES, KvLayout

TOKENS_PER_ANCHOR = 10
MAX_STEPS = 31
NUM_SYMBOLS = 2 * MAX_STEPS + 1  # 63: the entropy coder searches a table of that many in two registers

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_WORDS = {"float32": np.uint32, "bfloat16": np.uint16, "int8": np.uint8, "fp8": np.uint8}
_FLOATS, _SYMBOLS = 4 * ["float32[:, ::1]"], 2 * ["uint8[:, :, ::1]"]
_SIGNATURES = [
    f"void({word}[::1], int64[:, ::1], int64, {', '.join([*_FLOATS, *_SYMBOLS])})"
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


def quantize(memory: Bytes, slots: Sequence[int], bins: Bins, *, layout: KvLayout) -> tuple[Bytes, Bytes]:
    """The symbols of the anchors [G, A, C] and of the deltas [G, D, C] of the blocks in `slots`."""
    anchors, deltas = make_room(layout, num_blocks=len(slots))
    _quantize(
        *_places(memory, slots, layout), bins.mean_GC, bins.alpha_GC, bins.anchor_bin_GC, bins.delta_bin_GC,
        anchors, deltas,
    )  # fmt: skip
    return anchors, deltas


def dequantize_(
    memory: Bytes, slots: Sequence[int], symbols: tuple[Bytes, Bytes], bins: Bins, *, layout: KvLayout
) -> None:
    """Fills the blocks in `slots` from the symbols that `quantize` gave."""
    _dequantize(
        *_places(memory, slots, layout), bins.mean_GC, bins.alpha_GC, bins.anchor_bin_GC, bins.delta_bin_GC,
        *symbols,
    )  # fmt: skip


def read_values(memory: Bytes, slots: Sequence[int], *, layout: KvLayout) -> Floats:
    """The KV of the blocks in `slots`, [G, tokens, C] in float32."""
    words_SLW, ids = _words(memory, slots, layout)
    wide = words_SLW[ids].astype(np.uint32) << np.uint32(_shift(layout))
    shape = (len(ids), num_groups(layout), layout.block_size_tokens, layout.head_dim)
    values = wide.view(np.float32).reshape(shape).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(values).reshape(shape[1], -1, layout.head_dim)


def write_values_(memory: Bytes, slots: Sequence[int], values_GTC: Floats, *, layout: KvLayout) -> None:
    """Fills the blocks in `slots` from [G, tokens, C]; bfloat16 rounds to the nearest."""
    words_SLW, ids = _words(memory, slots, layout)
    bits = np.ascontiguousarray(values_GTC, np.float32).view(np.uint32)
    if _shift(layout):
        bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    shape = (bits.shape[0], len(ids), layout.block_size_tokens, layout.head_dim)
    blocks = bits.astype(words_SLW.dtype).reshape(shape).transpose(1, 0, 2, 3)
    words_SLW[ids] = blocks.reshape(len(ids), layout.num_layers, -1)


def write_blocks_(memory: Bytes, slots: Sequence[int], blocks_NX: Bytes, *, layout: KvLayout) -> None:
    """Fills the blocks in `slots` with these bytes."""
    words_SLW, ids = _words(memory, slots, layout)
    words_SLW[ids] = blocks_NX.reshape(len(ids), layout.num_layers, -1).view(words_SLW.dtype)


def _words(
    memory: Bytes, slots: Sequence[int], layout: KvLayout
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The memory as words [S, L, W], and the slots."""
    shape = (len(memory), layout.num_layers, layout.layer_block_bytes)
    if memory.shape not in (shape, (len(memory), layout.block_bytes)) or memory.strides[-1] != 1:
        raise ValueError(f"blocks lie in {shape} bytes, the last of them contiguous, got {memory.shape}")
    ids = np.array(slots, np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < len(memory)):
        raise ValueError(f"slots must be in 0..{len(memory) - 1}, got {slots}")
    return memory.reshape(shape).view(_WORDS[layout.dtype]), ids


def _places(
    memory: Bytes, slots: Sequence[int], layout: KvLayout
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
    """The memory as one row of words, where in it each layer of each block begins [L, N], and `_shift`."""
    words_SLW, ids = _words(memory, slots, layout)
    steps = [stride // words_SLW.itemsize for stride in words_SLW.strides]
    reach = 1 + sum((size - 1) * step for size, step in zip(words_SLW.shape, steps, strict=True))
    row_W = np.lib.stride_tricks.as_strided(words_SLW, (reach,), (words_SLW.itemsize,))
    starts_LN = np.arange(layout.num_layers)[:, None] * steps[1] + ids * steps[0]
    return row_W, starts_LN, _shift(layout)


def _shift(layout: KvLayout) -> int:
    """How far a word is from the left end of a float32."""
    if layout.is_scaled:
        raise ValueError(f"KV of {layout.dtype} is quantised already and coded as it is")
    return 32 - 8 * ITEM_BYTES[layout.dtype]


@njit(inline="always")
def _symbol(value: Any, scale: Any) -> Any:
    """Not round(): adding first makes it a cut of positive numbers, which is one vector instruction."""
    steps = value * scale + np.float32(MAX_STEPS + 0.5)
    steps = steps if steps > np.float32(0.0) else np.float32(0.0)  # NaN too
    last = np.float32(2 * MAX_STEPS)
    return np.uint8(np.int32(steps if steps < last else last))


@njit(_SIGNATURES, **_OPTIONS)
def _quantize(
    row_W: Any, starts_LN: Any, shift: int, mean_GC: Any, alpha_GC: Any, anchor_bin_GC: Any,
    delta_bin_GC: Any, anchors_GAC: Any, deltas_GDC: Any,
) -> None:  # fmt: skip
    num_groups, width = mean_GC.shape
    num_tokens = anchors_GAC.shape[1] + deltas_GDC.shape[1]
    num_layers, num_blocks = starts_LN.shape
    groups_of_layer = num_groups // num_layers
    block_size = num_tokens // max(1, num_blocks)
    values, base = np.empty(width, np.float32), np.empty(width, np.float32)
    bits = values.view(np.uint32)
    for g in range(num_groups):
        mean, alpha, anchor_bin, delta_bin = mean_GC[g], alpha_GC[g], anchor_bin_GC[g], delta_bin_GC[g]
        anchor_scale = np.float32(1.0) / anchor_bin
        delta_scale = np.float32(1.0) / delta_bin
        for t in range(num_tokens):
            place = (g % groups_of_layer * block_size + t % block_size) * width
            start = starts_LN[g // groups_of_layer, t // block_size] + place
            words = row_W[start : start + width]
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
    row_W: Any, starts_LN: Any, shift: int, mean_GC: Any, alpha_GC: Any, anchor_bin_GC: Any,
    delta_bin_GC: Any, anchors_GAC: Any, deltas_GDC: Any,
) -> None:  # fmt: skip
    num_groups, width = mean_GC.shape
    num_tokens = anchors_GAC.shape[1] + deltas_GDC.shape[1]
    num_layers, num_blocks = starts_LN.shape
    groups_of_layer = num_groups // num_layers
    block_size = num_tokens // max(1, num_blocks)
    values, base = np.empty(width, np.float32), np.empty(width, np.float32)
    bits, words = values.view(np.uint32), np.empty(width, row_W.dtype)
    source, first = np.uint64(words.ctypes.data), np.uint64(row_W.ctypes.data)
    word_bytes = np.uint64(words.itemsize)
    row_bytes = np.uint64(width) * word_bytes
    # Whoever attends to the pages does so when the last chunk is here: long after the caches have lost the first.
    places = first | row_bytes  # of all rows: with no remainder only if none of them has one
    for start in starts_LN.flat:
        places |= np.uint64(start) * word_bytes
    is_whole_lines = places % np.uint64(LINE_BYTES) == 0
    for g in range(num_groups):
        mean, alpha, anchor_bin, delta_bin = mean_GC[g], alpha_GC[g], anchor_bin_GC[g], delta_bin_GC[g]
        for t in range(num_tokens):
            place = (g % groups_of_layer * block_size + t % block_size) * width
            start = np.uint64(starts_LN[g // groups_of_layer, t // block_size] + place)
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
            if is_whole_lines:
                write_(source, first + start * word_bytes, row_bytes)
            else:
                for c in range(width):
                    row_W[start + c] = words[c]
    finish()
