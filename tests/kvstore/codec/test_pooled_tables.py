import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec.entropy import (
    MAX_SYMBOLS,
    TOTAL_FREQUENCY,
    SymbolTables,
    count_symbols,
    decode_symbols,
    encode_symbols,
    fit_frequencies,
)
from kvstore.codec.pooled_tables import pack_tables, pool_tables, unpack_tables
from kvstore.errors import CodecCorrupted


@given(
    num_rows=st.integers(1, 70),
    num_tokens=st.integers(0, 40),
    num_symbols=st.integers(1, MAX_SYMBOLS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_symbols_survive_with_the_tables_they_bring_along(
    num_rows: int, num_tokens: int, num_symbols: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    symbols = random.binomial(num_symbols - 1, random.uniform(), (num_rows, num_tokens)).astype(np.uint8)
    tables = pool_tables(symbols, num_symbols=num_symbols)
    data = encode_symbols(symbols, tables)

    shipped = unpack_tables(pack_tables(tables), num_rows=num_rows)

    np.testing.assert_array_equal(shipped.frequencies_NS, tables.frequencies_NS)
    decoded = np.empty_like(symbols)
    decode_symbols(data, shipped, out=decoded)
    np.testing.assert_array_equal(decoded, symbols)


def test_pooled_tables_cost_little_more_than_a_known_table_for_each_row() -> None:
    random = np.random.default_rng(0)
    deltas = random.laplace(size=(1024, 2530)) * np.exp(random.normal(0.5, 0.7, (1024, 1)))
    seen = (np.rint(deltas).clip(-31, 31) + 31).astype(np.uint8)
    symbols = seen[:, :230]
    known = SymbolTables.from_frequencies(fit_frequencies(count_symbols(seen, num_symbols=63)))
    pooled = pool_tables(symbols, num_symbols=63)
    size = len(pack_tables(pooled)) + len(encode_symbols(symbols, pooled))
    assert size <= 1.04 * len(encode_symbols(symbols, known))


@given(data=st.binary(max_size=200), num_rows=st.integers(0, 100))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_tables_or_corrupted(data: bytes, num_rows: int) -> None:
    try:
        tables = unpack_tables(data, num_rows=num_rows)
    except CodecCorrupted:
        return
    assert tables.num_rows == num_rows
    assert tables.frequencies_NS.sum(axis=1).tolist() == [TOTAL_FREQUENCY] * len(tables.bounds_NS)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_changed_tables_are_other_tables_or_corrupted(data: st.DataObject) -> None:
    symbols = np.random.default_rng(0).integers(0, 9, (20, 4000), dtype=np.uint8)
    packed = bytearray(pack_tables(pool_tables(symbols, num_symbols=9)))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    try:
        tables = unpack_tables(bytes(packed), num_rows=20)
    except CodecCorrupted:
        return
    assert tables.frequencies_NS.sum(axis=1).tolist() == [TOTAL_FREQUENCY] * len(tables.bounds_NS)
    assert tables.table_of_row_R.max() < len(tables.bounds_NS)


@pytest.mark.parametrize("cut", [0, 1, 2, 21, 22, -1])
def test_tables_that_are_cut_off_are_corrupted(cut: int) -> None:
    symbols = np.random.default_rng(0).integers(0, 9, (20, 4000), dtype=np.uint8)
    packed = pack_tables(pool_tables(symbols, num_symbols=9))
    with pytest.raises(CodecCorrupted):
        unpack_tables(packed[:cut], num_rows=20)


def test_tables_that_are_not_pooled_are_not_packed() -> None:
    with pytest.raises(ValueError, match="at most 64 tables"):
        pack_tables(SymbolTables.from_frequencies(fit_frequencies(np.ones((65, 3)))))
    with pytest.raises(ValueError, match="without a 0"):
        pack_tables(SymbolTables.from_frequencies([[TOTAL_FREQUENCY, 0]]))
