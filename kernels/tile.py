"""The inner loops of attention, with their sums in vector registers.

tile:     out[m * out_stride + n] = sum_k w[n * w_stride + k] x[m * x_stride + k] for n < 4 and m < num_columns, at
          most MAX_TILE_COLUMNS.
mix:      out[m * out_stride + c] += sum_t p[m * p_stride + t] v[t * v_stride + c] for t < num_rows, c < LANES and
          m < num_columns, at most MIX_COLUMNS; mix_wide for c < 2 LANES, mix_narrow for one c.
prefetch: starts to bring `num_bytes` at an address to L2.

A sum over k is the same to the last bit in all of them: LANES sums of every LANES-th product, added as a tree of
halves, then what is left of k one by one. So what a row of x gives does not depend on the rows beside it, and a
request's tokens not on the batch they are computed in (He and Thinking Machines Lab, "Defeating Nondeterminism in LLM
Inference", 2025).

Strides in floats; w, x, p, v and out are addresses. Written as LLVM vector code, because the compiler does not keep a
tile of sums in registers when it vectorises the plain loops (measured: 5 GB/s a thread against 18).
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
    add_lanes,
    ask_for,
    each_case,
    fma,
    load,
    loop,
    rows_of,
    spread,
)

TILE_ROWS = 4
# Without AVX-512 half the tile, for its 16 registers: a larger one has more sums than `add_lanes` returns, too.
MAX_TILE_COLUMNS = 4 if LANES == 16 else 2
MIX_COLUMNS = 4


@intrinsic
def tile(_typing, num_columns, w, w_stride, x, x_stride, depth, out, out_stride):
    def generate(context, builder, _signature, values):
        num_columns, w, w_stride, x, x_stride, depth, out, out_stride = values
        w_rows = rows_of(builder, w, w_stride, TILE_ROWS)
        for columns in each_case(builder, num_columns, MAX_TILE_COLUMNS):
            x_rows = rows_of(builder, x, x_stride, columns)
            _store_products(builder, w_rows, x_rows, depth, rows_of(builder, out, out_stride, columns))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@intrinsic
def prefetch(_typing, address, num_bytes):
    def generate(context, builder, _signature, values):
        address, num_bytes = values

        def body(offset, _sums):
            ask_for(builder, builder.add(address, offset))
            return []

        loop(builder, ir.Constant(I64, 0), num_bytes, CACHE_LINE_BYTES, [], body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _make_mix(kind, num_vectors):
    @intrinsic
    def mix(_typing, num_columns, p, p_stride, v, v_stride, num_rows, out, out_stride):
        def generate(context, builder, _signature, values):
            num_columns, p, p_stride, v, v_stride, num_rows, out, out_stride = values
            v_row = builder.inttoptr(v, F32.as_pointer())
            for columns in each_case(builder, num_columns, MIX_COLUMNS):
                p_rows = rows_of(builder, p, p_stride, columns)
                out_rows = rows_of(builder, out, out_stride, columns)
                _add_mixed(builder, p_rows, v_row, v_stride, num_rows, out_rows, kind, num_vectors)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return mix


def _add_mixed(builder, p_rows, v_row, v_stride, num_rows, out_rows, kind, num_vectors):
    """out_rows[m] += sum_t p_rows[m][t] v[t], `num_vectors` of `kind` wide."""
    offsets = [ir.Constant(I64, i * LANES) for i in range(num_vectors)]
    places = [builder.gep(row, [offset]) for row in out_rows for offset in offsets]

    def add_row(t, sums):
        start = builder.mul(t, v_stride)
        v_values = [load(builder, v_row, builder.add(start, offset), kind) for offset in offsets]
        weights = [spread(builder, load(builder, row, t, F32), kind) for row in p_rows]
        products = [(weight, v_value) for weight in weights for v_value in v_values]
        return [fma(builder, *product, total) for product, total in zip(products, sums, strict=True)]

    zero = ir.Constant(I64, 0)
    sums = loop(builder, zero, num_rows, 1, [load(builder, place, zero, kind) for place in places], add_row)
    for place, total in zip(places, sums, strict=True):
        builder.store(total, builder.bitcast(place, kind.as_pointer()), align=4)


def _store_products(builder, w_rows, x_rows, depth, out_rows):
    """out_rows[m][n] = w_rows[n].x_rows[m]."""
    num_sums = len(w_rows) * len(x_rows)
    whole = builder.and_(depth, ir.Constant(I64, -LANES))
    zeros = [ir.Constant(VECTOR, [0.0] * LANES)] * num_sums
    sums = _accumulate(builder, ir.Constant(I64, 0), whole, VECTOR, w_rows, x_rows, zeros)
    total = add_lanes(builder, sums)
    kind = ir.VectorType(F32, len(w_rows))
    for m, row in enumerate(out_rows):
        lanes = ir.Constant(
            ir.VectorType(ir.IntType(32), len(w_rows)), [m * len(w_rows) + n for n in range(len(w_rows))]
        )
        part = builder.shuffle_vector(total, ir.Constant(VECTOR, ir.Undefined), lanes)
        builder.store(part, builder.bitcast(row, kind.as_pointer()), align=4)
    with builder.if_then(builder.icmp_signed("<", whole, depth), likely=False):
        places = [builder.gep(row, [ir.Constant(I64, n)]) for row in out_rows for n in range(len(w_rows))]
        sums = [builder.load(place) for place in places]
        sums = _accumulate(builder, whole, depth, F32, w_rows, x_rows, sums)
        for place, total in zip(places, sums, strict=True):
            builder.store(total, place)


def _accumulate(builder, start, stop, kind, w_rows, x_rows, sums):
    """Adds the products of rows over k, LANES or 1 at a time."""

    def add_products(k, sums):
        w_values = [load(builder, row, k, kind) for row in w_rows]
        x_values = [load(builder, row, k, kind) for row in x_rows]
        products = [(w_value, x_value) for x_value in x_values for w_value in w_values]
        return [fma(builder, *product, total) for product, total in zip(products, sums, strict=True)]

    return loop(builder, start, stop, LANES if kind is VECTOR else 1, sums, add_products)


mix, mix_wide, mix_narrow = _make_mix(VECTOR, 1), _make_mix(VECTOR, 2), _make_mix(F32, 1)
