import numpy as np
import pytest

from kvstore.codec.comparisons import (
    KIVI_TOKENS,
    Sections,
    decode_int8,
    decode_kivi,
    encode_int8,
    encode_kivi,
)
from kvstore.codec.format import Section
from kvstore.errors import CodecCorrupted
from tests.kvstore.codec.coding import layout_of, values_of

HEADS = 2
LAYOUT = layout_of("float32")
HALF = 2.0**-10  # relative, of scales that are halves


def views(sections: Sections) -> tuple[memoryview, memoryview]:
    return memoryview(sections[Section.VALUES]), memoryview(sections[Section.SCALES])


def test_8_bits_are_within_half_a_step_of_the_largest_value_of_the_token() -> None:
    values = values_of(LAYOUT, num_tokens=48)
    decoded = decode_int8(*views(encode_int8(values)), shape=values.shape)
    largest = np.abs(values).max(axis=2, keepdims=True)
    assert (np.abs(decoded - values) <= largest / 127 * 0.5 * (1 + 256 * HALF)).all()


@pytest.mark.parametrize("num_bits", [4, 2])
@pytest.mark.parametrize("num_tokens", [16, 32, 48, 256])
def test_kivi_steps_per_channel_for_keys_and_per_token_for_values(num_bits: int, num_tokens: int) -> None:
    values = values_of(LAYOUT, num_tokens=num_tokens)
    coded = encode_kivi(values, num_heads=HEADS, num_bits=num_bits)
    assert len(coded[Section.VALUES]) == values.size * num_bits // 8
    decoded = decode_kivi(*views(coded), shape=values.shape, num_heads=HEADS, num_bits=num_bits)
    for layer in range(LAYOUT.num_layers):
        keys = slice(layer * 2 * HEADS, layer * 2 * HEADS + HEADS)
        for start in range(0, num_tokens, KIVI_TOKENS):
            group = values[keys, start : start + KIVI_TOKENS]
            error = np.abs(decoded[keys, start : start + KIVI_TOKENS] - group)
            assert (error <= allowed(group, axis=1, num_bits=num_bits)).all()
        rest = slice(keys.stop, keys.stop + HEADS)
        error = np.abs(decoded[rest] - values[rest])
        assert (error <= allowed(values[rest], axis=2, num_bits=num_bits)).all()


def allowed(group: np.ndarray, *, axis: int, num_bits: int) -> np.ndarray:
    step = (group.max(axis=axis, keepdims=True) - group.min(axis=axis, keepdims=True)) / (2**num_bits - 1)
    bound: np.ndarray = step * 0.5 + np.abs(group).max() * 2 * HALF
    return bound


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("change", [-1, 1])
def test_sections_of_another_size_are_corrupt(part: int, change: int) -> None:
    values = values_of(LAYOUT, num_tokens=32)
    eight, four = encode_int8(values), encode_kivi(values, num_heads=HEADS, num_bits=4)
    with pytest.raises(CodecCorrupted):
        decode_int8(*changed(eight, part, change), shape=values.shape)
    with pytest.raises(CodecCorrupted):
        decode_kivi(*changed(four, part, change), shape=values.shape, num_heads=HEADS, num_bits=4)


def changed(sections: Sections, part: int, change: int) -> tuple[memoryview, memoryview]:
    given = [bytes(view) for view in views(sections)]
    given[part] = given[part][:change] if change < 0 else given[part] + bytes(change)
    return memoryview(given[0]), memoryview(given[1])
