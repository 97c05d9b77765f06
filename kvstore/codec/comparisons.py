"""What CacheGen is compared with: 8 bits a value, and KIVI's 4 and 2 (Liu et al., 2024), without entropy coding.

8 bits: symmetric, one scale per token and head. KIVI: from the least to the largest value in equal steps; keys per
channel in groups of KIVI_TOKENS tokens, values per token and head. KIVI's window of exact last tokens is left out.

G groups (layer, keys or values, head), T tokens, C channels of a head, N token groups. Scales are halves.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore.codec.format import Section
from kvstore.codec.quantize import Floats
from kvstore.errors import CodecCorrupted

KIVI_TOKENS = 32
_LEAST_STEP = 2.0**-14  # the least normal half: below, a step would lose its precision and then become 0
_MOST_STEP = 65504.0
Sections = dict[Section, bytes]
Item = TypeVar("Item", bound=np.generic)


def encode_int8(values_GTC: Floats) -> Sections:
    steps_GT1 = _as_steps(np.abs(values_GTC).max(axis=2, keepdims=True) / 127)
    numbers = np.clip(np.rint(values_GTC / steps_GT1.astype(np.float32)), -127, 127).astype(np.int8)
    return {Section.VALUES: numbers.tobytes(), Section.SCALES: steps_GT1.tobytes()}


def decode_int8(values: memoryview, scales: memoryview, *, shape: tuple[int, int, int]) -> Floats:
    groups, tokens, _ = shape
    steps_GT1 = _take(scales, np.float16, (groups, tokens, 1)).astype(np.float32)
    decoded: Floats = _take(values, np.int8, shape).astype(np.float32) * steps_GT1
    return decoded


def encode_kivi(values_GTC: Floats, *, num_heads: int, num_bits: int) -> Sections:
    """`num_heads` groups are keys, as many values, and so on; `num_bits` divides 8."""
    last = 2**num_bits - 1
    packed, scales = [], []
    for part, is_keys in _parts(values_GTC, num_heads):
        low, high = (
            _extremes(part) if is_keys else (part.min(axis=2, keepdims=True), part.max(axis=2, keepdims=True))
        )
        lows = np.clip(low, -_MOST_STEP, _MOST_STEP).astype(np.float16)
        steps = _as_steps((high - lows) / last)
        low_f, step_f = (_spread(each, part.shape[1], is_keys).astype(np.float32) for each in (lows, steps))
        packed.append(_pack(np.clip(np.rint((part - low_f) / step_f), 0, last).astype(np.uint8), num_bits))
        scales += [lows.tobytes(), steps.tobytes()]
    return {Section.VALUES: b"".join(packed), Section.SCALES: b"".join(scales)}


def decode_kivi(
    values: memoryview, scales: memoryview, *, shape: tuple[int, int, int], num_heads: int, num_bits: int
) -> Floats:
    out = np.empty(shape, np.float32)
    _, tokens, width = shape
    num_packed = num_heads * tokens * width * num_bits // 8
    for part, is_keys in _parts(out, num_heads):
        scale_shape = (num_heads, -(-tokens // KIVI_TOKENS), width) if is_keys else (num_heads, tokens, 1)
        num_scales = 2 * int(np.prod(scale_shape))
        lows = _take(scales[:num_scales], np.float16, scale_shape)
        steps = _take(scales[num_scales : 2 * num_scales], np.float16, scale_shape)
        numbers = _unpack(_take(values[:num_packed], np.uint8, (num_packed,)), num_bits).reshape(part.shape)
        low_f, step_f = (_spread(each, tokens, is_keys).astype(np.float32) for each in (lows, steps))
        part[:] = low_f + numbers * step_f
        values, scales = values[num_packed:], scales[2 * num_scales :]
    if len(values) or len(scales):
        raise CodecCorrupted(f"{len(values)} bytes of values and {len(scales)} of scales are left over")
    return out


def _parts(values_GTC: Floats, num_heads: int) -> list[tuple[Floats, bool]]:
    """Views of the keys and the values of each layer, and whether they are keys."""
    starts = range(0, len(values_GTC), num_heads)
    return [(values_GTC[start : start + num_heads], part % 2 == 0) for part, start in enumerate(starts)]


def _extremes(part_GTC: Floats) -> tuple[Floats, Floats]:
    starts = np.arange(0, part_GTC.shape[1], KIVI_TOKENS)
    return np.minimum.reduceat(part_GTC, starts, axis=1), np.maximum.reduceat(part_GTC, starts, axis=1)


def _spread(scales: npt.NDArray[np.float16], num_tokens: int, is_keys: bool) -> npt.NDArray[np.float16]:
    return np.repeat(scales, KIVI_TOKENS, axis=1)[:, :num_tokens] if is_keys else scales


def _as_steps(steps: Floats) -> npt.NDArray[np.float16]:
    return np.clip(steps, _LEAST_STEP, _MOST_STEP).astype(np.float16)


def _pack(numbers: npt.NDArray[np.uint8], num_bits: int) -> bytes:
    shifts = np.arange(0, 8, num_bits, dtype=np.uint8)
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(numbers.reshape(-1, len(shifts)) << shifts, axis=1)
    return packed.tobytes()


def _unpack(packed: npt.NDArray[np.uint8], num_bits: int) -> npt.NDArray[np.uint8]:
    shifts = np.arange(0, 8, num_bits, dtype=np.uint8)
    numbers: npt.NDArray[np.uint8] = packed[:, None] >> shifts & np.uint8(2**num_bits - 1)
    return numbers


def _take(data: memoryview, dtype: type[Item], shape: tuple[int, ...]) -> npt.NDArray[Item]:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise CodecCorrupted(f"{len(data)} bytes where {shape} of {np.dtype(dtype)} take {expected}")
    taken: npt.NDArray[Item] = np.frombuffer(data, dtype).reshape(shape)
    if not np.isfinite(taken).all():
        raise CodecCorrupted("scales of a chunk that are not finite")
    return taken
