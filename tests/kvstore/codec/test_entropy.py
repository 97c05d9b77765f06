import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec.entropy import (
    MAX_SYMBOLS,
    TOTAL_FREQUENCY,
    Symbols,
    SymbolTables,
    count_symbols,
    decode_symbols,
    encode_symbols,
    fit_frequencies,
)
from kvstore.errors import CodecCorrupted


def draw_symbols(*, num_rows: int, num_tokens: int, scale: float, num_symbols: int, seed: int = 0) -> Symbols:
    """Like deltas of KV: around the middle, and each channel as wide as it likes."""
    random = np.random.default_rng(seed)
    scales = scale * np.exp(random.normal(0, 0.3, (num_rows, 1)))
    deltas = np.rint(random.laplace(size=(num_rows, num_tokens)) * scales)
    return (deltas.clip(-(num_symbols // 2), num_symbols // 2) + num_symbols // 2).astype(np.uint8)


def fitted_tables(symbols: Symbols, *, num_symbols: int) -> SymbolTables:
    return SymbolTables.from_frequencies(fit_frequencies(count_symbols(symbols, num_symbols=num_symbols)))


def entropy_bytes(symbols: Symbols, *, num_symbols: int) -> float:
    """Of each row by itself, with its own counts as its distribution."""
    counts = count_symbols(symbols, num_symbols=num_symbols)
    shares = counts / symbols.shape[1]
    return float(-(counts * np.log2(np.where(counts > 0, shares, 1))).sum() / 8)


@pytest.mark.parametrize("scale", [0.2, 0.4, 1.0, 3.0, 8.0])
def test_coded_size_is_within_two_percent_of_the_entropy(scale: float) -> None:
    symbols = draw_symbols(num_rows=1024, num_tokens=230, scale=scale, num_symbols=63)
    data = encode_symbols(symbols, fitted_tables(symbols, num_symbols=63))
    entropy = entropy_bytes(symbols, num_symbols=63)
    num_state_bytes = 128
    assert len(data) - num_state_bytes <= 1.02 * entropy


def test_a_symbol_that_the_tables_never_saw_is_coded() -> None:
    tables = SymbolTables.from_frequencies(fit_frequencies(np.array([[1000] + [0] * 254])))
    symbols = np.arange(255, dtype=np.uint8)[None]
    decoded = np.empty_like(symbols)
    decode_symbols(encode_symbols(symbols, tables), tables, out=decoded)
    np.testing.assert_array_equal(decoded, symbols)


def test_rows_share_tables() -> None:
    frequencies = fit_frequencies([[9, 1, 1], [1, 1, 9]])
    tables = SymbolTables.from_frequencies(frequencies, table_of_row_R=[1, 0, 1, 1])
    symbols = np.array([[2, 2, 1], [0, 0, 1], [2, 2, 2], [0, 2, 2]], np.uint8)
    decoded = np.empty_like(symbols)
    decode_symbols(encode_symbols(symbols, tables), tables, out=decoded)
    np.testing.assert_array_equal(decoded, symbols)
    np.testing.assert_array_equal(tables.frequencies_NS, frequencies)


def test_a_stream_may_begin_at_any_byte() -> None:
    symbols = draw_symbols(num_rows=5, num_tokens=50, scale=2, num_symbols=31)
    tables = fitted_tables(symbols, num_symbols=31)
    decoded = np.empty_like(symbols)
    decode_symbols(memoryview(b"-" + encode_symbols(symbols, tables))[1:], tables, out=decoded)
    np.testing.assert_array_equal(decoded, symbols)


def test_channels_last_is_the_same_stream() -> None:
    rows = draw_symbols(num_rows=12, num_tokens=50, scale=2, num_symbols=31)
    tables = fitted_tables(rows, num_symbols=31)
    channels_last = np.ascontiguousarray(rows.reshape(3, 4, 50).transpose(0, 2, 1))
    stream = encode_symbols(channels_last, tables)
    assert stream == encode_symbols(rows, tables)
    np.testing.assert_array_equal(
        count_symbols(channels_last, num_symbols=31), count_symbols(rows, num_symbols=31)
    )
    decoded = np.empty_like(channels_last)
    decode_symbols(stream, tables, out=decoded)
    np.testing.assert_array_equal(decoded, channels_last)


@given(data=st.binary(max_size=600), num_symbols=st.sampled_from([1, 31, 63, MAX_SYMBOLS]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_or_are_corrupted(data: bytes, num_symbols: int) -> None:
    tables = SymbolTables.from_frequencies(fit_frequencies(np.ones((5, num_symbols))))
    guarded = np.full((7, 40), 0xA5, np.uint8)
    try:
        decode_symbols(data, tables, out=guarded[1:6])
    except CodecCorrupted:
        pass
    else:
        assert guarded[1:6].max() < num_symbols
    assert set(guarded[0]) | set(guarded[6]) == {0xA5}


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_stream_that_lacks_or_gains_bytes_is_corrupted(data: st.DataObject) -> None:
    symbols = draw_symbols(
        num_rows=6, num_tokens=50, scale=2, num_symbols=31, seed=data.draw(st.integers(0, 99))
    )
    tables = fitted_tables(symbols, num_symbols=31)
    stream = encode_symbols(symbols, tables)
    cut = data.draw(st.integers(0, len(stream) - 1))
    room = np.empty_like(symbols)
    for wrong in (stream[:cut], stream + b"\0\0", stream + b"\0"):
        with pytest.raises(CodecCorrupted):
            decode_symbols(wrong, tables, out=room)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_frequencies_are_whole_and_never_zero(data: st.DataObject) -> None:
    num_symbols = data.draw(st.integers(1, MAX_SYMBOLS))
    counts = data.draw(st.lists(st.integers(0, 2**40), min_size=num_symbols, max_size=num_symbols))
    frequencies = fit_frequencies([counts])
    assert frequencies.min() >= 1
    assert frequencies.sum() == TOTAL_FREQUENCY


def test_wrong_tables_and_symbols_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to"):
        SymbolTables.from_frequencies([[1, 2, 3]])
    with pytest.raises(ValueError, match="1 to 255 symbols, got 256"):
        SymbolTables.from_frequencies(np.full((1, 256), 64))
    with pytest.raises(ValueError, match="there are 1 tables"):
        SymbolTables.from_frequencies([[TOTAL_FREQUENCY]], table_of_row_R=[1])
    tables = SymbolTables.from_frequencies([[TOTAL_FREQUENCY - 1, 0, 1]])
    with pytest.raises(ValueError, match="symbol 3"):
        encode_symbols(np.array([[3]], np.uint8), tables)
    with pytest.raises(ValueError, match="no code"):
        encode_symbols(np.array([[1]], np.uint8), tables)
    with pytest.raises(ValueError, match="1 rows"):
        encode_symbols(np.zeros((2, 1), np.uint8), tables)
    with pytest.raises(ValueError, match="C-contiguous"):
        decode_symbols(bytes(128), tables, out=np.zeros((1, 8), np.uint8)[:, ::2])


async def test_coding_in_a_thread_leaves_the_event_loop_free() -> None:
    """Other processes may take the core, so what counts is how often the loop turns while calls run, not how late."""
    symbols = np.tile(draw_symbols(num_rows=512, num_tokens=4096, scale=2, num_symbols=63), (10, 1))
    tables = fitted_tables(symbols, num_symbols=63)
    room = np.empty_like(symbols)

    def code() -> None:
        decode_symbols(encode_symbols(symbols, tables), tables, out=room)

    work = asyncio.create_task(asyncio.to_thread(code))
    turns = 0
    while not work.done():
        await asyncio.wait([work], timeout=0.001)
        turns += 1
    await work
    np.testing.assert_array_equal(room, symbols)
    # About 100 with nothing else running; 15 if the calls held the interpreter lock.
    assert turns >= 30
