"""The rANS decoder for all its lanes at once, where the processor has AVX-512.

32 lanes find their symbols together: a binary search in a table that stays in one or two registers. What `rans.py` says
of one symbol then happens to all. One step waits for the one before it, so what counts is how long the chain from
states to states is, not how many instructions there are:

    the states are two registers, of their low and of their high words, so that nothing is packed or unpacked
    the first levels of the search choose between bounds that were spread over registers once a row: 4 cycles a level
    where a permutation takes 10
    the bounds that a search has met last are the symbol's own, and need no look-up of their own

About 60 instructions for 32 symbols. Tables of 64, rows of 230 symbols, one core of a Xeon with AVX-512: 1030
million symbols a second, where packed states, a permutation a level and symbols stored one by one had 700.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiled import forget_stale

forget_stale(Path(__file__).parent)
NUM_LANES = 32
# As numba compiles: for this processor, unless told otherwise.
_is_for_host = config.CPU_NAME is None  # type: ignore[attr-defined]
_features = llvmlite.binding.get_host_cpu_features()
IS_SUPPORTED = _is_for_host and _features.get("avx512bw", False)
_EXPANDS_WORDS = _features.get("avx512vbmi2", False)
_NUM_SPREAD_LEVELS = 4
_HALF = NUM_LANES // 2
_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_WORDS, _SYMBOLS, _MASK = (ir.VectorType(kind, NUM_LANES) for kind in (_I16, _I8, _I1))
_HALF_WORDS, _HALF_STATES = ir.VectorType(_I16, _HALF), ir.VectorType(_I32, _HALF)
_PLANE_BYTES = 2 * NUM_LANES


@dataclass(frozen=True, slots=True)
class _Table:
    """Of one row, in registers. `spread[i]` are the bounds that level i of the search may meet, each in all lanes."""

    lower: Any
    upper: Any
    spread: list[list[Any]]
    width: int


@dataclass(frozen=True, slots=True)
class _States:
    low: Any
    high: Any


def make_row_decoder(width: int, *, total_bits: int) -> Any:
    """Decodes one row with a table of `width` bounds, 32 or 64.

    Arguments are the addresses of the words, the bounds, the states (the low words of all lanes, then the high ones)
    and the room for symbols, and how many there are. Returns how many words they took; looks at NUM_LANES more, and
    fills the room up to a multiple of NUM_LANES.
    """

    def decode_row(_typing: Any, words: Any, bounds: Any, states: Any, out: Any, num_tokens: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            words, bounds, states, out, num_tokens = values
            table = _load_table(builder, bounds, width, total_bits)
            places = [states, _add(builder, states, _PLANE_BYTES)]
            keep: Any = cgutils.alloca_once_value
            kept = [keep(builder, _load(builder, place, _WORDS)) for place in places]
            taken, filled = (keep(builder, ir.Constant(_I64, 0)) for _ in range(2))

            def decode(is_active: Any) -> None:
                before = _States(*(builder.load(each) for each in kept))
                place = builder.add(words, builder.shl(builder.load(taken), ir.Constant(_I64, 1)))
                symbols, after, is_low = _decode(builder, before, table, total_bits)
                if is_active is not None:
                    is_low = builder.and_(is_low, is_active)
                low = _expand(builder, place, is_low, after.low)
                high = builder.select(is_low, after.low, after.high)
                if is_active is not None:
                    low = builder.select(is_active, low, before.low)
                    high = builder.select(is_active, high, before.high)
                for each, value in zip(kept, (low, high), strict=True):
                    builder.store(value, each)
                count = builder.zext(builder.ctpop(builder.bitcast(is_low, _I32)), _I64)
                builder.store(builder.add(builder.load(taken), count), taken)
                num_filled = builder.load(filled)
                _store(builder, builder.trunc(symbols, _SYMBOLS), builder.add(out, num_filled))
                builder.store(_add(builder, num_filled, NUM_LANES), filled)

            num_whole = builder.lshr(num_tokens, ir.Constant(_I64, 5))
            with cgutils.for_range(builder, num_whole):
                decode(None)
            num_left = builder.and_(num_tokens, ir.Constant(_I64, NUM_LANES - 1))
            with builder.if_then(builder.icmp_unsigned("!=", num_left, ir.Constant(_I64, 0))):
                lanes = ir.Constant(_WORDS, list(range(NUM_LANES)))
                decode(builder.icmp_unsigned("<", lanes, _spread(builder, builder.trunc(num_left, _I16))))
            for each, place in zip(kept, places, strict=True):
                _store(builder, builder.load(each), place)
            return builder.load(taken)

        return types.uint64(*[types.uint64] * 5), generate

    return intrinsic(decode_row)


def _load_table(builder: Any, bounds: Any, width: int, total_bits: int) -> _Table:
    def bound(index: int) -> Any:
        return _spread(builder, _load(builder, _add(builder, bounds, 2 * index), _I16))

    steps = [width >> level for level in range(_NUM_SPREAD_LEVELS)]
    after_lower = _add(builder, bounds, _PLANE_BYTES)
    return _Table(
        lower=_load(builder, bounds, _WORDS),
        upper=_all(1 << total_bits) if width == NUM_LANES else _load(builder, after_lower, _WORDS),
        spread=[[bound(index) for index in range(step // 2, width, step)] for step in steps],
        width=width,
    )


def _decode(builder: Any, states: _States, table: _Table, total_bits: int) -> tuple[Any, _States, Any]:
    """Symbols, the states after them, and which of these need a word."""
    slots = builder.and_(states.low, _all((1 << total_bits) - 1))
    symbols, starts, ends = _search(builder, slots, table, total_bits)
    sizes, offsets = builder.sub(ends, starts), builder.sub(slots, starts)
    # A quotient has 17 bits: the states without the 15 of their slots.
    quotients = _call(builder, "llvm.fshl.v32i16", states.high, states.low, _all(16 - total_bits))
    is_long = builder.icmp_signed("<", states.high, _all(0))
    high = _call(builder, "llvm.x86.avx512.pmulhu.w.512", sizes, quotients)
    high = builder.select(is_long, builder.add(high, sizes), high)
    product = builder.mul(sizes, quotients)
    low = builder.add(product, offsets)
    is_over = builder.icmp_unsigned("<", low, product)
    # Not whether the sum is 0: that would wait for the carry three times as long.
    is_low = builder.and_(builder.icmp_unsigned("==", high, _all(0)), builder.not_(is_over))
    high = builder.select(is_over, builder.add(high, _all(1)), high)
    return symbols, _States(low, high), is_low


def _search(builder: Any, slots: Any, table: _Table, total_bits: int) -> tuple[Any, Any, Any]:
    """Symbols, where they start and where they end: the last bound that is at most the slot, and the next one."""
    starts, ends = _all(0), _all(1 << total_bits)
    indices, distance = _all(table.width // 2), table.width // 2
    is_above: list[Any] = []
    while distance:
        level = len(is_above)
        if level < _NUM_SPREAD_LEVELS:
            met = _choose(builder, table.spread[level], is_above)
        else:
            met = _pick(builder, table, indices)
        above = builder.icmp_unsigned("<=", met, slots)
        starts, ends = builder.select(above, met, starts), builder.select(above, ends, met)
        distance //= 2
        lower = _all(distance or 1)
        upper = builder.add(indices, lower) if distance else indices
        indices = builder.select(above, upper, builder.sub(indices, lower))
        is_above.append(above)
    return indices, starts, ends


def _choose(builder: Any, bounds: list[Any], is_above: list[Any]) -> Any:
    """Of the bounds of a level the one that the levels before lead to. The last of these is known last."""
    for above in is_above:
        half = len(bounds) // 2
        bounds = [builder.select(above, *pair) for pair in zip(bounds[half:], bounds[:half], strict=True)]
    return bounds[0]


def _pick(builder: Any, table: _Table, indices: Any) -> Any:
    """Bounds by index; of an index, the processor looks at the low six bits only."""
    return _call(builder, "llvm.x86.avx512.vpermi2var.hi.512", table.lower, indices, table.upper)


def _expand(builder: Any, place: Any, is_taken: Any, others: Any) -> Any:
    """The words at `place`, in order, to the lanes that take one."""
    if _EXPANDS_WORDS:
        words = _load(builder, place, _WORDS)
        return _call(builder, "llvm.x86.avx512.mask.expand.v32i16", words, others, is_taken)
    halves = []
    for start in (0, _HALF):
        order = ir.Constant(ir.VectorType(_I32, _HALF), list(range(start, start + _HALF)))
        taken = builder.shuffle_vector(is_taken, ir.Constant(_MASK, ir.Undefined), order)
        wide = builder.zext(_load(builder, place, _HALF_WORDS), _HALF_STATES)
        none = ir.Constant(_HALF_STATES, [0] * _HALF)
        found = _call(builder, f"llvm.x86.avx512.mask.expand.v{_HALF}i32", wide, none, taken)
        halves.append(builder.trunc(found, _HALF_WORDS))
        count = builder.zext(builder.ctpop(builder.bitcast(taken, _I16)), _I64)
        place = builder.add(place, builder.shl(count, ir.Constant(_I64, 1)))
    both = builder.shuffle_vector(
        *halves, ir.Constant(ir.VectorType(_I32, NUM_LANES), list(range(NUM_LANES)))
    )
    return builder.select(is_taken, both, others)


def _spread(builder: Any, number: Any) -> Any:
    unset = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(unset, number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, unset, ir.Constant(ir.VectorType(_I32, NUM_LANES), [0] * NUM_LANES))


def _all(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * NUM_LANES)


def _add(builder: Any, address: Any, num_bytes: int) -> Any:
    return builder.add(address, ir.Constant(_I64, num_bytes))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    signature = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
    get: Any = cgutils.get_or_insert_function
    return builder.call(get(builder.module, signature, name), arguments)
