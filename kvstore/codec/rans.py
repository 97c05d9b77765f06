"""Interleaved rANS: the compiled loops of `entropy.py`, which says what they are for.

A stream is NUM_LANES states of 32 bits, then 16-bit words, all little-endian. Symbol t of a row belongs to lane
t % NUM_LANES; the lanes share the words. To decode one symbol from state x, with `slot` the low TOTAL_BITS of x:

    symbol = the one whose [start, end) holds slot
    x = (end - start) * (x >> TOTAL_BITS) + slot - start
    if x < 2^16: x = x << 16 | next word

The encoder runs the same backwards, from the last symbol to the first, and begins with all states 2^16: so a stream is
whole exactly if the decoder ends with these states and no words left.

A symbol is found by comparing its slot with all bounds of the table in vector registers and counting the ones: a
table is one or two cache lines, where a slot table of the same precision is 32 KiB and has to be built for each row.
Written as LLVM vector code, because the compiler spreads the same loop over several registers of 64-bit sums. With
AVX-512, tables of up to 63 symbols are searched for all lanes at once (`rans_vector.py`).

The decoder cannot leave its arrays, whatever the words are: a slot is at least the first bound and less than the last,
so that the count is in 1..width-1; a row takes at most one word a token and looks NUM_LANES ahead, and `words` has
that many to spare.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from kvstore.codec import rans_vector
from kvstore.codec.byte_tiles import turn_

NUM_LANES = rans_vector.NUM_LANES
TOTAL_BITS = 15
WIDTHS = (32, 64, 256)  # of tables
_LOW = 1 << 16  # states are in [_LOW, 2^32) between symbols
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


def _make_search(width: int) -> Any:
    """How many of the `width` numbers at an address are at most `slot`."""

    def search(_typing: Any, bounds: Any, slot: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            address, slot = values
            number, wide = ir.IntType(16), ir.IntType(256)
            vector = ir.VectorType(number, width)
            held = builder.load(builder.inttoptr(address, vector.as_pointer()))
            held.align = 2
            unset = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(unset, builder.trunc(slot, number), ir.Constant(ir.IntType(32), 0))
            order = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
            ones = builder.icmp_unsigned("<=", held, builder.shuffle_vector(first, unset, order))
            mask = builder.bitcast(ones, ir.IntType(width))
            padded = mask if width == wide.width else builder.zext(mask, wide)
            return builder.trunc(builder.ctpop(padded), ir.IntType(64))

        return types.uint64(types.uint64, types.uint32), generate

    return intrinsic(search)


def _make_row_decoder(width: int) -> Callable[..., Any]:
    search = _make_search(width)

    # Neither a signature nor a cache, which closures would miss: compiled and cached as a part of `decode`.
    @njit(nogil=True, error_model="numpy")
    def decode_row(words: Any, place: Any, bounds: Any, states: Any, out_T: Any) -> Any:
        """Returns where in `words` the next row begins. Unsigned indices, else each is tested for below 0."""
        address = np.uint64(bounds.ctypes.data)
        for t in range(np.uint64(len(out_T))):
            lane = t % np.uint64(NUM_LANES)
            x = np.uint32(states[0, lane]) | np.uint32(states[1, lane]) << np.uint32(16)
            slot = x & np.uint32((1 << TOTAL_BITS) - 1)
            end = search(address, slot)
            start = end - np.uint64(1)
            offset, size = np.uint32(bounds[start]), np.uint32(bounds[end] - bounds[start])
            x = size * (x >> np.uint32(TOTAL_BITS)) + (slot - offset)
            is_low = x < np.uint32(_LOW)
            longer = (x << np.uint32(16)) | np.uint32(words[place])
            # No branch: it would be mispredicted at each seventh symbol.
            x = longer if is_low else x
            states[0, lane], states[1, lane] = x & np.uint32(0xFFFF), x >> np.uint32(16)
            place += np.uint64(is_low)
            out_T[t] = np.uint8(start)
        return place

    return decode_row


def _make_group_decoder(width: int) -> Callable[..., Any]:
    """Of the rows of one group, which leaves `out_CT` wider than its tokens are."""
    decode_row = _make_row_decoder(width)

    @njit(nogil=True, error_model="numpy")
    def decode_group(
        words: Any, num_words: Any, place: Any, bounds_NS: Any, table_of_row_C: Any, states: Any, out_CT: Any,
        num_tokens: Any,
    ) -> Any:  # fmt: skip
        """Returns where in `words` the next group begins, or a place after `num_words` if they are not enough."""
        for channel in range(len(out_CT)):
            bounds = bounds_NS[table_of_row_C[channel]]
            place = decode_row(words, place, bounds, states, out_CT[channel, :num_tokens])
            if place > num_words:
                break
        return place

    return decode_group


def _make_vector_group_decoder(width: int) -> Callable[..., Any]:
    decode_row = rans_vector.make_row_decoder(width, total_bits=TOTAL_BITS)

    @njit(nogil=True, error_model="numpy")
    def decode_group(
        words: Any, num_words: Any, place: Any, bounds_NS: Any, table_of_row_C: Any, states: Any, out_CT: Any,
        num_tokens: Any,
    ) -> Any:  # fmt: skip
        # Addresses, because a slice of an array counts references: 40 ns a row, a tenth of decoding it.
        first_word, tables = np.uint64(words.ctypes.data), np.uint64(bounds_NS.ctypes.data)
        planes, room = np.uint64(states.ctypes.data), np.uint64(out_CT.ctypes.data)
        for channel in range(np.uint64(len(out_CT))):
            place += decode_row(
                first_word + np.uint64(2) * place,
                tables + np.uint64(2 * width) * np.uint64(table_of_row_C[channel]),
                planes,
                room + np.uint64(out_CT.shape[1]) * channel,
                np.uint64(num_tokens),
            )
            if place > num_words:
                break
        return place

    return decode_group


_make_narrow = _make_vector_group_decoder if rans_vector.IS_SUPPORTED else _make_group_decoder
_decode_group_32, _decode_group_64 = _make_narrow(32), _make_narrow(64)
_decode_group_256 = _make_group_decoder(256)


@njit("void(uint8[:, :, ::1], uint32[:, ::1])", **_OPTIONS)
def count(symbols_GTC: Any, counts_RS: Any) -> Any:
    """Adds to `counts_RS` how often each symbol is in each row; all must be less than its width."""
    num_groups, num_tokens, num_channels = symbols_GTC.shape
    for group in range(num_groups):
        for t in range(num_tokens):
            for channel in range(num_channels):
                counts_RS[group * num_channels + channel, symbols_GTC[group, t, channel]] += np.uint32(1)


@njit("int64(uint8[:, :, ::1], uint16[:, ::1], uint32[::1], uint16[::1])", **_OPTIONS)
def encode(symbols_GTC: Any, bounds_NS: Any, table_of_row_R: Any, words: Any) -> Any:
    """Fills `words` from its end; returns where the stream begins, or -1 at a symbol that has no code.

    `words` must have room for 2 * NUM_LANES and one a symbol.
    """
    num_tokens, num_channels = symbols_GTC.shape[1:]
    states = np.full(NUM_LANES, _LOW, np.uint32)
    place = len(words)
    for row in range(len(table_of_row_R) - 1, -1, -1):
        bounds = bounds_NS[table_of_row_R[row]]
        symbols_T = symbols_GTC[row // num_channels, :, row % num_channels]
        for t in range(num_tokens - 1, -1, -1):
            symbol = np.int64(symbols_T[t])
            start = np.uint32(bounds[symbol])
            size = np.uint32(bounds[symbol + 1]) - start
            if size == 0:
                return -1
            x = states[t % NUM_LANES]
            words[place - 1] = x & np.uint32(0xFFFF)  # overwritten unless the state is full
            is_full = (x >> np.uint32(32 - TOTAL_BITS)) >= size
            place -= 1 if is_full else 0
            x = x >> np.uint32(16) if is_full else x
            quotient = np.uint32(x // size)
            states[t % NUM_LANES] = (quotient << np.uint32(TOTAL_BITS)) + (x - quotient * size) + start
    for lane in range(NUM_LANES - 1, -1, -1):
        place -= 2
        words[place] = states[lane] & np.uint32(0xFFFF)
        words[place + 1] = states[lane] >> np.uint32(16)
    return place


@njit(nogil=True, error_model="numpy")
def _copy(source_X: Any, target_X: Any) -> None:
    """As much as there is room for. Not an assignment of slices, which numba does byte by byte."""
    for x in range(len(target_X)):
        target_X[x] = source_X[x]


@njit("boolean(uint16[::1], int64, uint16[:, ::1], uint32[::1], uint8[:, :, ::1])", **_OPTIONS)
def decode(words: Any, num_words: Any, bounds_NS: Any, table_of_row_R: Any, out_GTC: Any) -> Any:
    """Fills `out_GTC`; False if the stream is not whole (`out_GTC` then holds garbage).

    `words` is longer than the stream's `num_words` by the tokens of a row and NUM_LANES.
    """
    if num_words < 2 * NUM_LANES:
        return False
    states = np.empty((2, NUM_LANES), np.uint16)
    for lane in range(NUM_LANES):
        states[0, lane], states[1, lane] = words[2 * lane], words[2 * lane + 1]
    place, end, width = np.uint64(2 * NUM_LANES), np.uint64(num_words), bounds_NS.shape[1]
    num_groups, num_tokens, num_channels = out_GTC.shape
    room = (num_tokens // NUM_LANES + 1) * NUM_LANES
    rows_CT, turned_TC = np.empty((num_channels, room), np.uint8), np.empty((room, num_channels), np.uint8)
    for group in range(num_groups):
        tables_C = table_of_row_R[group * num_channels : (group + 1) * num_channels]
        if width == 32:
            place = _decode_group_32(words, end, place, bounds_NS, tables_C, states, rows_CT, num_tokens)
        elif width == 64:
            place = _decode_group_64(words, end, place, bounds_NS, tables_C, states, rows_CT, num_tokens)
        else:
            place = _decode_group_256(words, end, place, bounds_NS, tables_C, states, rows_CT, num_tokens)
        if place > end:
            return False
        turn_(rows_CT, turned_TC, num_tokens)
        _copy(turned_TC.ravel(), out_GTC[group].ravel())
    return place == end and np.all(states[0] == 0) and np.all(states[1] == 1)
