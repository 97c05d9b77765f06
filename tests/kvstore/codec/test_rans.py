import hashlib
import os
import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec.entropy import MAX_SYMBOLS, SymbolTables, decode_symbols, encode_symbols, fit_frequencies

LANES, LOW, BITS = 32, 1 << 16, 15


def decode_by_the_book(data: bytes, frequencies: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The decoder of docs/kv-bitstream.md, in the plainest way: one table per row."""
    words = [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]
    states = [words[2 * lane] | words[2 * lane + 1] << 16 for lane in range(LANES)]
    place, rows = 2 * LANES, []
    for table in frequencies:
        row = []
        for t in range(num_tokens):
            x = states[t % LANES]
            slot, start, symbol = x % (1 << BITS), 0, 0
            while slot >= start + table[symbol]:
                start, symbol = start + table[symbol], symbol + 1
            x = table[symbol] * (x >> BITS) + slot - start
            if x < LOW:
                x, place = x << 16 | words[place], place + 1
            states[t % LANES] = x
            row.append(symbol)
        rows.append(row)
    assert states == [LOW] * LANES
    assert place == len(words)
    return rows


@given(
    seed=st.integers(0, 2**32 - 1),
    num_symbols=st.sampled_from([1, 2, 3, 31, 32, 63, 64, 200, MAX_SYMBOLS]),
    num_rows=st.integers(1, 5),
    num_tokens=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_a_stream_is_what_the_document_says(
    seed: int, num_symbols: int, num_rows: int, num_tokens: int
) -> None:
    random = np.random.default_rng(seed)
    counts = random.exponential(size=(num_rows, num_symbols)) ** random.uniform(0, 8)
    frequencies = fit_frequencies(counts)
    symbols = random.integers(0, num_symbols, (num_rows, num_tokens), dtype=np.uint8)
    tables = SymbolTables.from_frequencies(frequencies)

    data = encode_symbols(symbols, tables)

    assert decode_by_the_book(data, frequencies.tolist(), num_tokens) == symbols.tolist()
    decoded = np.empty_like(symbols)
    decode_symbols(data, tables, out=decoded)
    np.testing.assert_array_equal(decoded, symbols)


def test_the_bytes_of_a_stream_are_pinned() -> None:
    """A change of these bytes is a new version of the format."""
    frequencies = np.array([[16384, 8192, 8192], [1, 2, 32765]])
    symbols = np.stack([np.arange(300) ** 2 % 5 // 2, 2 - (np.arange(300) % 97 == 0)]).astype(np.uint8)
    data = encode_symbols(symbols, SymbolTables.from_frequencies(frequencies))
    assert len(data) == 136
    assert (
        hashlib.sha256(data).hexdigest() == "5d0e4a4180712d8fa3caa3900243841f4c8acfc841125fb5d2abcfbe0656c700"
    )


PLAIN_PROCESSOR = """
import sys
import numpy as np
from kvstore.codec.entropy import SymbolTables, decode_symbols, fit_frequencies
for num_symbols in (31, 63, 255):
    counts = np.arange(1, num_symbols + 1) ** np.arange(3)[:, None]
    tables = SymbolTables.from_frequencies(fit_frequencies(counts))
    symbols = np.empty((3, 100), np.uint8)
    decode_symbols(bytes.fromhex(sys.stdin.readline()), tables, out=symbols)
    print(symbols.tobytes().hex())
"""


def test_a_processor_without_avx512_decodes_the_same() -> None:
    streams, sent = [], []
    for num_symbols in (31, 63, 255):
        counts = np.arange(1, num_symbols + 1) ** np.arange(3)[:, None]
        symbols = np.random.default_rng(0).integers(0, num_symbols, (3, 100), dtype=np.uint8)
        sent.append(symbols.tobytes().hex())
        tables = SymbolTables.from_frequencies(fit_frequencies(counts))
        streams.append(encode_symbols(symbols, tables).hex())
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PROCESSOR],
        input="\n".join(streams),
        env=os.environ | {"NUMBA_CPU_NAME": "generic"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == sent
