"""Interleaved rANS: the compiled loops of `entropy.py`, which says what they are for.

A stream is NUM_LANES states of 32 bits, then 16-bit words, all little-endian. Symbol t of a row belongs to lane
t % NUM_LANES; the lanes share the words. To decode one symbol from state x, with `slot` the low TOTAL_BITS of x:

    symbol = the one whose [start, end) holds slot
    x = (end - start) * (x >> TOTAL_BITS) + slot - start
    if x < 2^16: x = x << 16 | next word

The encoder runs the same backwards, from the last symbol to the first, and begins with all states 2^16: so a stream is
whole exactly if the decoder ends with these states and no words left.

A symbol is found by comparing its slot with all bounds of the table in vector registers and counting the ones: a
table is one or two cache lines, where a slot table of the same precision is 16 KiB and has to be built for each row.

Neither loop trusts what it reads: a count is within the table whatever the slot is, and where fewer words remain than
a row could need, each read is checked.
"""

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

NUM_LANES = 32
TOTAL_BITS = 14
GROUP = 32  # bounds compared at once: one AVX-512 register of 16-bit numbers
_LOW = 1 << 16  # states are in [_LOW, 2^32) between symbols
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


def _generate_count(_typing: Any, bounds: Any, slot: Any) -> Any:
    """How many of the GROUP numbers at an address are at most `slot`."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        address, slot = values
        number, mask = ir.IntType(16), ir.IntType(GROUP)
        vector = ir.VectorType(number, GROUP)
        held = builder.load(builder.inttoptr(address, vector.as_pointer()))
        held.align = 2
        first = builder.insert_element(
            ir.Constant(vector, ir.Undefined), builder.trunc(slot, number), ir.Constant(ir.IntType(32), 0)
        )
        order = ir.Constant(ir.VectorType(ir.IntType(32), GROUP), [0] * GROUP)
        slots = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), order)
        ones = builder.bitcast(builder.icmp_unsigned("<=", held, slots), mask)
        return builder.zext(builder.ctpop(ones), ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


_count_up_to: Any = intrinsic(_generate_count)


@njit("void(uint8[:, ::1], uint32[:, ::1])", **_OPTIONS)
def count(symbols_RT: Any, counts_RS: Any) -> Any:
    """Adds to `counts_RS` how often each symbol is in each row; all must be less than its width."""
    for row in range(len(symbols_RT)):
        counts = counts_RS[row]
        for t in range(symbols_RT.shape[1]):
            counts[symbols_RT[row, t]] += np.uint32(1)


@njit("int64(uint8[:, ::1], uint16[:, ::1], uint32[::1], uint16[::1])", **_OPTIONS)
def encode(symbols_RT: Any, bounds_NS: Any, table_of_row_R: Any, words: Any) -> Any:
    """Fills `words` from its end; returns where the stream begins, or -1 at a symbol that has no code.

    `words` must have room for 2 * NUM_LANES and one a symbol.
    """
    num_rows, num_tokens = symbols_RT.shape
    states = np.full(NUM_LANES, _LOW, np.uint32)
    place = len(words)
    for row in range(num_rows - 1, -1, -1):
        bounds = bounds_NS[table_of_row_R[row]]
        for t in range(num_tokens - 1, -1, -1):
            symbol = np.int64(symbols_RT[row, t])
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


@njit("boolean(uint16[::1], uint16[:, ::1], uint32[::1], uint8[:, ::1])", **_OPTIONS)
def decode(words: Any, bounds_NS: Any, table_of_row_R: Any, out_RT: Any) -> Any:
    """Fills `out_RT`; False if the stream is not whole (`out_RT` then holds garbage)."""
    num_rows, num_tokens = out_RT.shape
    num_words = len(words)
    if num_words < 2 * NUM_LANES:
        return False
    states = np.empty(NUM_LANES, np.uint32)
    for lane in range(NUM_LANES):
        states[lane] = np.uint32(words[2 * lane]) | np.uint32(words[2 * lane + 1]) << np.uint32(16)
    place = 2 * NUM_LANES
    for row in range(num_rows):
        bounds = bounds_NS[table_of_row_R[row]]
        address = bounds.ctypes.data
        is_safe = num_words - place >= num_tokens
        for t in range(num_tokens):
            x = states[t % NUM_LANES]
            slot = x & np.uint32((1 << TOTAL_BITS) - 1)
            count = 0
            for group in range(0, len(bounds), GROUP):
                count += _count_up_to(address + 2 * group, slot)
            start = np.uint32(bounds[count - 1])
            x = (np.uint32(bounds[count]) - start) * (x >> np.uint32(TOTAL_BITS)) + slot - start
            is_low = x < np.uint32(_LOW)
            if is_low and not is_safe and place >= num_words:
                return False
            word = np.uint32(words[place if is_safe else min(place, num_words - 1)])
            x = x << np.uint32(16) | word if is_low else x
            place += 1 if is_low else 0
            states[t % NUM_LANES] = x
            out_RT[row, t] = count - 1
    return place == num_words and np.all(states == _LOW)
