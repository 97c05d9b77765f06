"""Tables for a chunk that has no profile: rows with like distributions share one, and the chunk carries them.

A row of 256 tokens is too short to describe its own distribution: that would cost a fifth of its coded size. So there
are only as many tables as the symbols can pay for, found by Lloyd's algorithm: each row goes to the table that codes
it in the fewest bits, each table becomes the distribution of its rows.

    offset  size  field
    0       1     num_tables
    1       1     num_symbols - 1
    2       1     for each row: its table
    ...     1-3   for each table, for each symbol: frequency - 1, seven bits a byte, the lowest first; 128 is added to
                  every byte but the last
"""

import numpy as np
import numpy.typing as npt

from kvstore.codec.entropy import Symbols, SymbolTables, count_symbols, fit_frequencies
from kvstore.errors import CodecCorrupted

MAX_TABLES = 64
# A table of 63 symbols takes 100 bytes: 2 % of what it serves, at 2.5 bits a symbol.
_SYMBOLS_PER_TABLE = 2**14
_NUM_ROUNDS = 3
_HEAD_BYTES = 2
_MAX_NUMBER_BYTES = 3


def pool_tables(symbols: Symbols, *, num_symbols: int) -> SymbolTables:
    """Fitted to these symbols, all less than `num_symbols`; every symbol has a code in every table."""
    counts = count_symbols(symbols, num_symbols=num_symbols).astype(np.float32)
    num_tables = int(np.clip(symbols.size // _SYMBOLS_PER_TABLE, 1, min(MAX_TABLES, len(counts))))
    # Rows start grouped by how far their symbols spread.
    numbers = np.arange(num_symbols, dtype=np.float32)
    means = counts @ numbers / max(symbols.shape[1], 1)
    spreads = counts @ numbers**2 / max(symbols.shape[1], 1) - means**2
    table_of_row = np.empty(len(counts), np.int64)
    table_of_row[np.argsort(spreads)] = np.arange(len(counts)) * num_tables // max(len(counts), 1)
    for _ in range(_NUM_ROUNDS):
        frequencies = fit_frequencies(_sum_by_table(counts, table_of_row, num_tables))
        table_of_row = np.argmax(counts @ np.log2(frequencies.astype(np.float32)).T, axis=1)
    frequencies = fit_frequencies(_sum_by_table(counts, table_of_row, num_tables))
    return SymbolTables.from_frequencies(frequencies, table_of_row_R=table_of_row)


def pack_tables(tables: SymbolTables) -> bytes:
    """Every symbol must have a code in every table, and tables be few, as `pool_tables` makes them."""
    less_one = tables.frequencies_NS.ravel().astype(np.int64) - 1
    if len(tables.bounds_NS) > MAX_TABLES or less_one.min(initial=0) < 0:
        raise ValueError(
            f"at most {MAX_TABLES} tables without a 0 can be packed, got {len(tables.bounds_NS)}"
        )
    head = bytes([len(tables.bounds_NS), tables.num_symbols - 1])
    return head + tables.table_of_row_R.astype(np.uint8).tobytes() + _pack_numbers(less_one)


def unpack_tables(data: bytes | memoryview, *, num_rows: int) -> SymbolTables:
    """Raises CodecCorrupted unless these are tables for that many rows, and nothing else."""
    if len(data) < _HEAD_BYTES + num_rows:
        raise CodecCorrupted(f"tables of {num_rows} rows in {len(data)} bytes")
    num_tables, num_symbols = data[0], data[1] + 1
    given = np.frombuffer(data, np.uint8)
    table_of_row, packed = given[_HEAD_BYTES : _HEAD_BYTES + num_rows], given[_HEAD_BYTES + num_rows :]
    if not 0 < num_tables <= MAX_TABLES:
        raise CodecCorrupted(f"{num_tables} tables, allowed are 1 to {MAX_TABLES}")
    frequencies = _unpack_numbers(packed) + 1
    if len(frequencies) != num_tables * num_symbols:
        raise CodecCorrupted(
            f"{num_tables} tables of {num_symbols} symbols, got {len(frequencies)} frequencies"
        )
    try:
        return SymbolTables.from_frequencies(
            frequencies.reshape(num_tables, num_symbols), table_of_row_R=table_of_row
        )
    except ValueError as e:
        raise CodecCorrupted(f"tables of a chunk: {e}") from e


def _sum_by_table(
    counts_RS: npt.NDArray[np.float32], table_of_row_R: npt.NDArray[np.int64], num_tables: int
) -> npt.NDArray[np.float32]:
    is_member_NR = (np.arange(num_tables)[:, None] == table_of_row_R).astype(np.float32)
    sums: npt.NDArray[np.float32] = is_member_NR @ counts_RS
    return sums


def _pack_numbers(numbers: npt.NDArray[np.int64]) -> bytes:
    shifts = 7 * np.arange(_MAX_NUMBER_BYTES)
    sevens = numbers[:, None] >> shifts
    is_needed = (sevens > 0) | (shifts == 0)
    goes_on = sevens >> 7 > 0
    packed = (sevens & 127 | goes_on << 7)[is_needed].astype(np.uint8)
    return bytes(packed)


def _unpack_numbers(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    ends = np.flatnonzero(packed < 128) + 1
    if len(ends) == 0 or ends[-1] != len(packed):
        raise CodecCorrupted(f"frequencies of tables are cut off after {len(packed)} bytes")
    starts = np.concatenate([[0], ends[:-1]])
    if np.max(ends - starts) > _MAX_NUMBER_BYTES:
        raise CodecCorrupted(f"a frequency of more than {_MAX_NUMBER_BYTES} bytes")
    shifts = 7 * (np.arange(len(packed)) - np.repeat(starts, ends - starts))
    numbers: npt.NDArray[np.int64] = np.add.reduceat((packed & 127).astype(np.int64) << shifts, starts)
    return numbers
