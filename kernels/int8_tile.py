"""The inner loop of int8 products, with its sums in vector registers.

int8_tile: sums[m * BLOCK + n] = start[m] + sum_k w[n][k] x[m * x_stride + k] for n < BLOCK and m < num_columns, at most
MAX_TILE_COLUMNS. w are bytes from 0 to 255, x from -128 to 127, sums and start int32; addresses, the stride in bytes.

w is a block as `kernels.int8_linear` packs it: for each group of 4 k, the 4 bytes of output 0, of output 1 and so on. A
vector then holds one group of LANES outputs, x is spread to all of them, and no sum is ever taken across a vector.

Where the processor has VNNI one instruction multiplies and adds 4 bytes in each lane. Elsewhere bytes are widened to
16 bits and multiplied by pairs. Sums of integers are exact, so both give the same bits, in whatever order they add.
"""

import llvmlite.binding
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.int8_rows import GROUP
from kernels.vectors import CACHE_LINE_BYTES, I64, LANES, ask_for, each_case, loop, make_room

I32 = ir.IntType(32)
_WORDS = ir.VectorType(I32, LANES)  # of 4 bytes: a group for each output
_HALVES = ir.VectorType(ir.IntType(16), 2 * LANES)
# 24 sums, 4 vectors of w and one of x in 32 registers (2 x 12, 3 x 8 and 1 x 24 were slower by 0 to 40 % on a Xeon);
# without AVX-512 6 sums, for widened bytes take 6 of the 16.
BLOCK_VECTORS, MAX_TILE_COLUMNS = (4, 6) if LANES == 16 else (2, 3)
BLOCK = BLOCK_VECTORS * LANES  # outputs that are packed and computed together
_LINES_AHEAD = 2


def _has_vnni() -> bool:
    if config.CPU_NAME is not None:
        return False
    return llvmlite.binding.get_host_cpu_features().get("avx512vnni" if LANES == 16 else "avxvnni", False)


HAS_VNNI = _has_vnni()


@intrinsic
def int8_tile(_typing, num_columns, w, num_groups, x, x_stride, start, sums, ahead, ahead_step):
    """Meanwhile brings lines at ahead + g * ahead_step (bytes) for each group g to L2, unless ahead is 0."""

    def generate(context, builder, _signature, values):
        num_columns, *others = values
        for columns in each_case(builder, num_columns, MAX_TILE_COLUMNS):
            _tile(builder, columns, *others)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate


room_for_sums = make_room(I32, MAX_TILE_COLUMNS * BLOCK)


def _tile(builder, columns, w, num_groups, x, x_stride, start, sums, ahead, ahead_step):
    word = I32.as_pointer()
    w_words, starts, sums = (builder.inttoptr(address, word) for address in (w, start, sums))
    x_rows = [builder.add(x, builder.mul(x_stride, ir.Constant(I64, m))) for m in range(columns)]
    x_words = [builder.inttoptr(row, word) for row in x_rows]

    def add_products(group, totals):
        place = builder.add(ahead, builder.mul(group, ahead_step))
        for line in range(_LINES_AHEAD):
            ask_for(builder, builder.add(place, ir.Constant(I64, CACHE_LINE_BYTES * line)))
        first = builder.mul(group, ir.Constant(I64, BLOCK))
        w_vectors = [
            _factors(builder, _load(builder, w_words, builder.add(first, ir.Constant(I64, LANES * v))), False)
            for v in range(BLOCK_VECTORS)
        ]
        added = []
        for m, row in enumerate(x_words):
            x_vector = _factors(builder, _spread(builder, builder.load(builder.gep(row, [group]))), True)
            for v, w_vector in enumerate(w_vectors):
                added.append(_add_dot(builder, totals[m * BLOCK_VECTORS + v], w_vector, x_vector))
        return added

    begin = [
        _spread(builder, builder.load(builder.gep(starts, [ir.Constant(I64, m)]))) for m in range(columns)
    ]
    totals = [total for total in begin for _ in range(BLOCK_VECTORS)]
    totals = loop(builder, ir.Constant(I64, 0), num_groups, 1, totals, add_products)
    for number, total in enumerate(totals):
        place = builder.gep(sums, [ir.Constant(I64, number * LANES)])
        builder.store(total, builder.bitcast(place, _WORDS.as_pointer()), align=4)


def _load(builder, words, index):
    place = builder.gep(words, [index])
    loaded = builder.load(builder.bitcast(place, _WORDS.as_pointer()))
    loaded.align = 4
    return loaded


def _spread(builder, word):
    nothing = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(nothing, word, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_WORDS, [0] * LANES))


def _factors(builder, words, signed):
    """What `_add_dot` takes: groups of bytes as they are, or the even and the odd bytes of each widened to 16 bits."""
    if HAS_VNNI:
        return words
    halves = builder.bitcast(words, _HALVES)
    eight = ir.Constant(_HALVES, [8] * 2 * LANES)
    shift = builder.ashr if signed else builder.lshr
    return shift(builder.shl(halves, eight), eight), shift(halves, eight)


def _add_dot(builder, total, w, x):
    """total + the sum of the 4 products in each lane."""
    if HAS_VNNI:
        signature = ir.FunctionType(_WORDS, [_WORDS] * 3)
        name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
        return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [total, w, x])
    for w_halves, x_halves in zip(w, x, strict=True):
        total = builder.add(total, _add_pairs(builder, w_halves, x_halves))
    return total


def _add_pairs(builder, w_halves, x_halves):
    """The sums of two neighbours' products, in the form that LLVM turns into one instruction (vpmaddwd)."""
    wide = ir.VectorType(I32, 2 * LANES)
    products = builder.mul(builder.sext(w_halves, wide), builder.sext(x_halves, wide))
    nothing = ir.Constant(wide, ir.Undefined)
    parts = [
        builder.shuffle_vector(products, nothing, ir.Constant(_WORDS, list(range(first, 2 * LANES, 2))))
        for first in (0, 1)
    ]
    return builder.add(*parts)


assert GROUP == 4
