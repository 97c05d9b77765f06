import mmap
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec.channels import KvStatistics
from kvstore.codec.quantize import (
    MAX_STEPS,
    NUM_SYMBOLS,
    TOKENS_PER_ANCHOR,
    Bins,
    dequantize_,
    quantize,
    read_values,
    write_values_,
)
from kvstore.layout import KvLayout
from tests.kvstore.codec.coding import arena_of, layout_of, values_of

DTYPES = ["float32", "bfloat16"]
BFLOAT16_STEP = 2.0**-8  # relative, of rounding


def reference(values_GTC: np.ndarray, bins: Bins) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anchors, deltas and decoded values by the formulas, token by token."""
    anchors, deltas, decoded = [], [], np.empty_like(values_GTC)
    base = bins.mean_GC
    for t in range(values_GTC.shape[1]):
        is_anchor = t % TOKENS_PER_ANCHOR == 0
        origin, width = (bins.mean_GC, bins.anchor_bin_GC) if is_anchor else (base, bins.delta_bin_GC)
        steps = np.clip(np.floor((values_GTC[:, t] - origin) / width + 0.5), -MAX_STEPS, MAX_STEPS)
        decoded[:, t] = origin + steps * width
        (anchors if is_anchor else deltas).append((steps + MAX_STEPS).astype(np.uint8))
        if is_anchor:
            base = bins.mean_GC + bins.alpha_GC * (decoded[:, t] - bins.mean_GC)
    return np.stack(anchors, axis=1), np.stack(deltas, axis=1), decoded


def bins_of(layout: KvLayout, level: int = 2) -> Bins:
    return KvStatistics.of([values_of(layout, num_tokens=640, seed=7)], layout=layout).bins(level=level)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 16])
def test_symbols_and_values_are_what_the_formulas_say(dtype: str, num_blocks: int) -> None:
    layout = layout_of(dtype)
    arena, out, slots = (
        arena_of(layout, num_blocks=num_blocks),
        np.empty((num_blocks, layout.block_bytes), np.uint8),
        range(num_blocks),
    )
    bins = replace(bins_of(layout), anchor_bin_GC=bins_of(layout, 1).delta_bin_GC)
    anchors, deltas = quantize(arena, slots, bins, layout=layout)
    expected_anchors, expected_deltas, decoded = reference(read_values(arena, slots, layout=layout), bins)
    # A value in the middle between two numbers may go either way.
    assert np.abs(anchors.astype(int) - expected_anchors).max() <= 1
    assert (anchors != expected_anchors).mean() < 0.001
    assert (deltas != expected_deltas).mean() < 0.01
    dequantize_(out, slots, (expected_anchors, expected_deltas), bins, layout=layout)
    np.testing.assert_allclose(
        read_values(out, slots, layout=layout),
        decoded,
        rtol=1e-5 if dtype == "float32" else BFLOAT16_STEP,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_begins_with_a_line_of_the_caches_gets_the_same_values(dtype: str) -> None:
    layout = layout_of(dtype, head_dim=64)
    slots, bins = range(3), bins_of(layout)
    symbols = quantize(arena_of(layout, num_blocks=3), slots, bins, layout=layout)
    memory = np.frombuffer(
        mmap.mmap(-1, 4 * layout.block_bytes), np.uint8
    )  # begins with a page, and so with a line
    found = []
    for start in (0, 4):
        out = memory[start : start + 3 * layout.block_bytes].reshape(3, -1)
        dequantize_(out, slots, symbols, bins, layout=layout)
        found.append(out.copy())
    np.testing.assert_array_equal(*found)
    assert found[0].any()


@pytest.mark.parametrize("padding_bytes", [4, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_that_are_padded_get_the_same_values_and_keep_their_padding(
    dtype: str, padding_bytes: int
) -> None:
    layout = layout_of(dtype, head_dim=64)
    slots, bins = range(3), bins_of(layout)
    symbols = quantize(arena_of(layout, num_blocks=3), slots, bins, layout=layout)
    expected = np.empty((3, layout.block_bytes), np.uint8)
    dequantize_(expected, slots, symbols, bins, layout=layout)
    slot_bytes = layout.block_bytes + padding_bytes
    # Begins with a line: of its slots only the first does, unless the padding is a line too.
    memory = np.frombuffer(mmap.mmap(-1, 3 * slot_bytes), np.uint8).reshape(3, slot_bytes)
    dequantize_(memory[:, : layout.block_bytes], slots, symbols, bins, layout=layout)
    np.testing.assert_array_equal(memory[:, : layout.block_bytes], expected)
    assert not memory[:, layout.block_bytes :].any()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.sampled_from(DTYPES), st.integers(1, 3), st.integers(0, 1000))
def test_no_value_is_further_away_than_half_a_bin(num_blocks: int, dtype: str, level: int, seed: int) -> None:
    layout = layout_of(dtype)
    arena = arena_of(layout, num_blocks=num_blocks, seed=seed)
    slots, out = range(num_blocks), np.empty((num_blocks, layout.block_bytes), np.uint8)
    values = read_values(arena, slots, layout=layout)
    bins = KvStatistics.of([values], layout=layout).bins(level=level)
    dequantize_(out, slots, quantize(arena, slots, bins, layout=layout), bins, layout=layout)
    decoded = read_values(out, slots, layout=layout)
    error = np.abs(decoded - values)
    rounding = np.maximum(np.abs(values), np.abs(decoded)) * (BFLOAT16_STEP if dtype == "bfloat16" else 1e-5)
    allowed = np.maximum(bins.anchor_bin_GC, bins.delta_bin_GC)[:, None] * 0.5001 + rounding * 2
    assert (error <= allowed).all()


def test_outliers_and_what_is_no_number_are_cut_to_the_last_bin() -> None:
    layout = layout_of("float32")
    arena = arena_of(layout, num_blocks=1)
    values = read_values(arena, [0], layout=layout)
    values[:, 0], values[:, 1], values[:, 2], values[:, 3] = 1e30, np.inf, -np.inf, np.nan
    write_values_(arena, [0], values, layout=layout)
    anchors, deltas = quantize(arena, [0], bins_of(layout), layout=layout)
    assert (anchors[:, 0] == NUM_SYMBOLS - 1).all()
    assert (deltas[:, 0] == NUM_SYMBOLS - 1).all()
    assert (deltas[:, 1:3] == 0).all()
    assert anchors.max() < NUM_SYMBOLS > deltas.max()


def test_slots_may_lie_anywhere_in_any_order() -> None:
    layout = layout_of("float32")
    arena = arena_of(layout, num_blocks=6)
    shuffled = arena[[3, 0, 5, 1, 4, 2]]
    bins = bins_of(layout)
    straight = quantize(arena, range(6), bins, layout=layout)
    for one, other in zip(straight, quantize(shuffled, [1, 3, 5, 0, 4, 2], bins, layout=layout), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("slots", [[-1], [0, 4], [10**9]])
def test_slots_outside_the_arena_are_refused(slots: list[int]) -> None:
    layout = layout_of("float32")
    with pytest.raises(ValueError, match="slots must be in"):
        quantize(arena_of(layout, num_blocks=4), slots, bins_of(layout), layout=layout)


def test_an_arena_of_another_layout_is_refused() -> None:
    layout = layout_of("float32")
    with pytest.raises(ValueError, match="blocks lie in"):
        quantize(arena_of(layout_of("bfloat16"), num_blocks=4), [0], bins_of(layout), layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_written_are_read_again(dtype: str) -> None:
    layout = layout_of(dtype)
    values = values_of(layout, num_tokens=48)
    arena = np.zeros((5, layout.block_bytes), np.uint8)
    write_values_(arena, [4, 0, 2], values, layout=layout)
    read = read_values(arena, [4, 0, 2], layout=layout)
    np.testing.assert_allclose(read, values, rtol=0 if dtype == "float32" else BFLOAT16_STEP)
    assert not arena[[1, 3]].any()
