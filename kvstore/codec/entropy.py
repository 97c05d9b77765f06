"""Symbols to bytes and back, near their entropy: interleaved rANS with one distribution per row.

A row is one channel of one layer's keys or values, its symbols are quantised tokens. Every row names the table of
its distribution. Tables come from the model's profile, or are pooled from the chunk itself and shipped with it
(`pooled_tables.py`).

Why not zstandard, which brings its own tables: it is larger. Bits per symbol, deltas of the demo model's KV (1024 rows
of 230 tokens a chunk) over 14,000 tokens of text that the tables had not seen; the entropy is that of each row over
all of them:

    bin size   entropy   rANS, profile   rANS, pooled   zstd 1   zstd 3   packed bits
    0.25       4.15      4.16  +0.3 %    4.21           4.30     4.59     6
    0.5        3.16      3.17  +0.3 %    3.22           3.43     3.71     6
    1          2.21      2.22  +0.4 %    2.27           2.63     2.72     5
    2          1.32      1.32  +0.6 %    1.38           1.86     1.83     4

Million symbols per second on one core (AMD EPYC, Zen 5): 340-510 encoded; decoded 740 with up to 31 symbols, 670 with
63 and 310 with 255 (AVX-512), or 300, 250 and 120 (AVX2). zstd 1: 280-550 encoded, 1100-2300 decoded. At 2 bits a
symbol a core with AVX-512 keeps up with a link of 1 Gbit/s; chunks are independent: more cores decode for a faster one.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from kvstore.codec import rans
from kvstore.errors import CodecCorrupted

# [rows, tokens], or [groups, tokens, channels], where row r is channel r % channels of group r // channels.
Symbols = npt.NDArray[np.uint8]
MAX_SYMBOLS = max(rans.WIDTHS) - 1
TOTAL_FREQUENCY = 1 << rans.TOTAL_BITS


@dataclass(frozen=True, kw_only=True, slots=True)
class SymbolTables:
    """Distributions over symbols 0..num_symbols-1, and which one each row has.

    Row n of `bounds_NS` is where the symbols of table n start: the sums of the frequencies before them; what is left
    of the row is TOTAL_FREQUENCY.
    """

    bounds_NS: npt.NDArray[np.uint16]
    table_of_row_R: npt.NDArray[np.uint32]
    num_symbols: int

    @classmethod
    def from_frequencies(
        cls, frequencies_NS: npt.ArrayLike, *, table_of_row_R: npt.ArrayLike | None = None
    ) -> Self:
        """One table per row unless said otherwise; each adds up to TOTAL_FREQUENCY. A symbol with 0 has no code."""
        frequencies = np.asarray(frequencies_NS, np.int64)
        num_tables, num_symbols = frequencies.shape
        if not 0 < num_symbols <= MAX_SYMBOLS:
            raise ValueError(f"a table has 1 to {MAX_SYMBOLS} symbols, got {num_symbols}")
        sums = frequencies.sum(axis=1)
        if frequencies.min(initial=0) < 0 or np.any(sums != TOTAL_FREQUENCY):
            raise ValueError(f"frequencies of a table must add up to {TOTAL_FREQUENCY}, got {sums}")
        tables = np.arange(num_tables) if table_of_row_R is None else np.asarray(table_of_row_R)
        if tables.max(initial=0) >= num_tables or tables.min(initial=0) < 0:
            raise ValueError(f"there are {num_tables} tables, a row names {tables.max(initial=0)}")
        width = next(width for width in rans.WIDTHS if width > num_symbols)
        bounds = np.full((num_tables, width), TOTAL_FREQUENCY, np.uint16)
        bounds[:, 0] = 0
        bounds[:, 1 : num_symbols + 1] = np.cumsum(frequencies, axis=1)
        return cls(bounds_NS=bounds, table_of_row_R=tables.astype(np.uint32), num_symbols=num_symbols)

    @property
    def frequencies_NS(self) -> npt.NDArray[np.uint16]:
        """A row for each table."""
        frequencies: npt.NDArray[np.uint16] = np.diff(self.bounds_NS[:, : self.num_symbols + 1], axis=1)
        return frequencies

    @property
    def num_rows(self) -> int:
        return len(self.table_of_row_R)


def fit_frequencies(counts_NS: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Frequencies as near to the counts as whole numbers can be, and at least 1: every symbol has a code."""
    counts = np.asarray(counts_NS, np.float64)
    num_symbols = counts.shape[1]
    counts = np.where(counts.sum(axis=1, keepdims=True) > 0, counts, 1.0)
    shares = counts / counts.sum(axis=1, keepdims=True)
    frequencies: npt.NDArray[np.int64] = 1 + np.floor(shares * (TOTAL_FREQUENCY - num_symbols)).astype(
        np.int64
    )
    frequencies[np.arange(len(counts)), counts.argmax(axis=1)] += TOTAL_FREQUENCY - frequencies.sum(axis=1)
    fitted: npt.NDArray[np.uint16] = frequencies.astype(np.uint16)
    return fitted


def count_symbols(symbols: Symbols, *, num_symbols: int) -> npt.NDArray[np.uint32]:
    """[rows, symbols]: how often each is in each row."""
    if symbols.max(initial=0) >= num_symbols:
        raise ValueError(f"symbol {symbols.max()} of an alphabet of {num_symbols}")
    symbols_GTC = _by_channel(np.ascontiguousarray(symbols))
    counts = np.zeros((_num_rows(symbols_GTC), num_symbols), np.uint32)
    rans.count(symbols_GTC, counts)
    return counts


def encode_symbols(symbols: Symbols, tables: SymbolTables) -> bytes:
    """Each symbol must have a code in the table of its row."""
    symbols_GTC = _by_channel(np.ascontiguousarray(symbols))
    if _num_rows(symbols_GTC) != tables.num_rows:
        raise ValueError(f"tables are for {tables.num_rows} rows, got symbols of shape {symbols.shape}")
    if symbols.max(initial=0) >= tables.num_symbols:
        raise ValueError(f"symbol {symbols.max()}, tables have {tables.num_symbols}")
    words = np.empty(2 * rans.NUM_LANES + symbols.size, np.uint16)
    start = rans.encode(symbols_GTC, tables.bounds_NS, tables.table_of_row_R, words)
    if start < 0:
        raise ValueError("a symbol has no code in the table of its row")
    return words[start:].tobytes()


def decode_symbols(data: bytes | memoryview, tables: SymbolTables, *, out: Symbols) -> None:
    """Fills `out`, C-contiguous.

    Raises CodecCorrupted unless `data` is a whole stream of that shape; `out` then holds garbage.
    """
    if not out.flags.c_contiguous:
        raise ValueError("the room for symbols must be C-contiguous")
    out_GTC = _by_channel(out)
    if _num_rows(out_GTC) != tables.num_rows:
        raise ValueError(f"tables are for {tables.num_rows} rows, got room of shape {out.shape}")
    if len(data) % 2:
        raise CodecCorrupted(f"a symbol stream of {len(data)} bytes, must be even")
    num_words = len(data) // 2
    words = np.zeros(num_words + out_GTC.shape[1] + rans.NUM_LANES, np.uint16)
    words[:num_words] = np.frombuffer(data, np.uint16)
    if not rans.decode(words, num_words, tables.bounds_NS, tables.table_of_row_R, out_GTC):
        raise CodecCorrupted(f"a symbol stream of {len(data)} bytes does not end where {out.size} symbols do")


def _by_channel(symbols: Symbols) -> Symbols:
    return symbols[:, :, None] if symbols.ndim == 2 else symbols


def _num_rows(symbols_GTC: Symbols) -> int:
    num_groups, _, num_channels = symbols_GTC.shape
    return int(num_groups * num_channels)
