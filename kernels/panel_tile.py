"""The inner loop of fp32 products, with its sums in vector registers.

panel_tile: out[m * out_stride + p] (+)= sum_k w[k * PANEL + p] x[m * x_stride + k] for p < PANEL and m < num_rows, at
most MAX_TILE_ROWS; `is_first` says that there is nothing yet to add to. A vector holds the weights of one input and
LANES outputs, and a number of x is spread to all of them: the outer product of Goto and van de Geijn, "Anatomy of
High-Performance Matrix Multiplication", 2008. No sum is taken across a vector, and each is over k in order, whatever
the number of rows: a row gives the same to the last bit beside any others.

Strides in floats; w, x and out are addresses. Meanwhile lines at ahead + k * ahead_step (bytes) are on their way to L2.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.vectors import (
    CACHE_LINE_BYTES,
    F32,
    I64,
    LANES,
    VECTOR,
    ask_for,
    each_case,
    fma,
    load,
    loop,
    rows_of,
    spread,
)

# 24 sums, 2 vectors of w and one of x in 32 registers; without AVX-512 12, 2 and 1 in 16.
_VECTORS = 2
MAX_TILE_ROWS = 12 if LANES == 16 else 6
PANEL = _VECTORS * LANES  # outputs that are packed and computed together


@intrinsic
def panel_tile(_typing, num_rows, w, x, x_stride, depth, out, out_stride, is_first, ahead, ahead_step):
    def generate(context, builder, _signature, values):
        num_rows, *others = values
        for count in each_case(builder, num_rows, MAX_TILE_ROWS):
            _tile(builder, count, *others)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, types.boolean, types.int64, types.int64), generate


def _tile(builder, num_rows, w, x, x_stride, depth, out, out_stride, is_first, ahead, ahead_step):
    w_row = builder.inttoptr(w, F32.as_pointer())
    x_rows, out_rows = rows_of(builder, x, x_stride, num_rows), rows_of(builder, out, out_stride, num_rows)
    offsets = [ir.Constant(I64, LANES * v) for v in range(_VECTORS)]
    places = [builder.gep(row, [offset]) for row in out_rows for offset in offsets]

    def add_products(k, sums):
        place = builder.add(ahead, builder.mul(k, ahead_step))
        for line in range(2):
            ask_for(builder, builder.add(place, ir.Constant(I64, CACHE_LINE_BYTES * line)))
        start = builder.mul(k, ir.Constant(I64, PANEL))
        weights = [load(builder, w_row, builder.add(start, offset), VECTOR) for offset in offsets]
        inputs = [spread(builder, load(builder, row, k, F32), VECTOR) for row in x_rows]
        products = [(weight, value) for value in inputs for weight in weights]
        return [fma(builder, *product, total) for product, total in zip(products, sums, strict=True)]

    sums = loop(builder, ir.Constant(I64, 0), depth, 1, _begin(builder, places, is_first), add_products)
    for place, total in zip(places, sums, strict=True):
        builder.store(total, builder.bitcast(place, VECTOR.as_pointer()), align=4)


def _begin(builder, places, is_first):
    """What the sums are before: 0, or what the places hold."""
    with builder.if_else(is_first) as (then, otherwise):
        with then:
            without = builder.block
        with otherwise:
            held = [load(builder, place, ir.Constant(I64, 0), VECTOR) for place in places]
            within = builder.block
    sums = []
    for value in held:
        sums.append(builder.phi(VECTOR))
        sums[-1].add_incoming(ir.Constant(VECTOR, [0.0] * LANES), without)
        sums[-1].add_incoming(value, within)
    return sums
