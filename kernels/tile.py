"""The inner loops of products and attention, with their sums in vector registers.

tile_X: out[m * x_step + n * w_step] = sum_k w[n * w_stride + k] x[m * x_stride + k] for n < 4 and m < X.
dot:    out[0] = sum_k w[k] x[k]. One row of w after the other is one stream of memory, the fastest way to read it.
mix_X:  out[m * out_stride + c] += sum_t p[m * p_stride + t] v[t * v_stride + c] for t < num_rows, c < LANES and m < X.
mix_1_narrow: the same for m < 1 and one c.
prefetch: starts to bring `num_bytes` at an address to L2. tile_X does so on its way, two cache lines for each vector
of k, at ahead + k * ahead_step (bytes): lines that come between products cost nothing, and no read waits for them.

Strides and steps in floats; w, x, p, v and out are addresses. Written as LLVM vector code, because the compiler does
not keep a tile of sums in registers when it vectorises the plain loops (measured: 5 GB/s a thread against 18).
"""

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE_ROWS = 4
_UNROLL = 4  # independent sums of `dot`, to hide the latency of an addition
# AVX-512 has 32 registers of 16 floats; everything else gets 8 lanes, and half the tile with its 16 registers.
_WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
LANES = 16 if _WIDE else 8
MAX_TILE_COLUMNS = 4 if _WIDE else 2
_LINE_BYTES = 64
_I64, _F32 = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)


def _make_tile(num_columns):
    @intrinsic
    def tile(_typing, w, w_stride, x, x_stride, depth, out, w_step, x_step, ahead, ahead_step):
        def generate(context, builder, _signature, values):
            w, w_stride, x, x_stride, depth, out, w_step, x_step, *ahead = values
            w_rows, x_rows = _rows(builder, w, w_stride, TILE_ROWS), _rows(builder, x, x_stride, num_columns)
            whole = builder.and_(depth, ir.Constant(_I64, -LANES))
            zeros = [ir.Constant(_VECTOR, [0.0] * LANES)] * (TILE_ROWS * num_columns)
            sums = _accumulate(builder, ir.Constant(_I64, 0), whole, _VECTOR, w_rows, x_rows, zeros, ahead)
            sums = [_add_lanes(builder, total) for total in sums]
            sums = _accumulate(builder, whole, depth, _F32, w_rows, x_rows, sums)
            base = builder.inttoptr(out, _F32.as_pointer())
            for i, total in enumerate(sums):
                m, n = divmod(i, TILE_ROWS)
                place = builder.add(
                    builder.mul(x_step, ir.Constant(_I64, m)), builder.mul(w_step, ir.Constant(_I64, n))
                )
                builder.store(total, builder.gep(base, [place]))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return tile


@intrinsic
def dot(_typing, w, x, depth, out):
    def generate(context, builder, _signature, values):
        w, x, depth, out = values
        rows = [builder.inttoptr(address, _F32.as_pointer()) for address in (w, x)]

        def add_products(kind):
            def body(k, sums):
                places = [builder.add(k, ir.Constant(_I64, i * LANES)) for i in range(len(sums))]
                pairs = [[_load(builder, row, place, kind) for row in rows] for place in places]
                return [_fma(builder, *pair, total) for pair, total in zip(pairs, sums, strict=True)]

            return body

        step = LANES * _UNROLL
        whole = builder.and_(depth, ir.Constant(_I64, -step))
        zeros = [ir.Constant(_VECTOR, [0.0] * LANES)] * _UNROLL
        first, *others = _loop(builder, ir.Constant(_I64, 0), whole, step, zeros, add_products(_VECTOR))
        for other in others:
            first = builder.fadd(first, other)
        (total,) = _loop(builder, whole, depth, 1, [_add_lanes(builder, first)], add_products(_F32))
        builder.store(total, builder.inttoptr(out, _F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def prefetch(_typing, address, num_bytes):
    def generate(context, builder, _signature, values):
        address, num_bytes = values

        def body(offset, _sums):
            _ask_for(builder, builder.add(address, offset))
            return []

        _loop(builder, ir.Constant(_I64, 0), num_bytes, _LINE_BYTES, [], body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _make_mix(num_columns, kind):
    @intrinsic
    def mix(_typing, p, p_stride, v, v_stride, num_rows, out, out_stride):
        def generate(context, builder, _signature, values):
            p, p_stride, v, v_stride, num_rows, out, out_stride = values
            zero = ir.Constant(_I64, 0)
            p_rows, out_rows = (
                _rows(builder, p, p_stride, num_columns),
                _rows(builder, out, out_stride, num_columns),
            )
            v_row = builder.inttoptr(v, _F32.as_pointer())

            def add_row(t, sums):
                v_values = _load(builder, v_row, builder.mul(t, v_stride), kind)
                weights = [_spread(builder, _load(builder, row, t, _F32), kind) for row in p_rows]
                return [
                    _fma(builder, weight, v_values, total)
                    for weight, total in zip(weights, sums, strict=True)
                ]

            sums = _loop(
                builder, zero, num_rows, 1, [_load(builder, row, zero, kind) for row in out_rows], add_row
            )
            for row, total in zip(out_rows, sums, strict=True):
                builder.store(total, builder.bitcast(row, kind.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return mix


def _rows(builder, base, stride, num_rows):
    rows = [builder.inttoptr(base, _F32.as_pointer())]
    for _ in range(num_rows - 1):
        rows.append(builder.gep(rows[-1], [stride]))
    return rows


def _accumulate(builder, start, stop, kind, w_rows, x_rows, sums, ahead=None):
    """Adds the products of rows over k, LANES or 1 at a time."""

    def add_products(k, sums):
        if ahead is not None:
            place = builder.add(ahead[0], builder.mul(k, ahead[1]))
            for line in range(2):
                _ask_for(builder, builder.add(place, ir.Constant(_I64, _LINE_BYTES * line)))
        w_values = [_load(builder, row, k, kind) for row in w_rows]
        x_values = [_load(builder, row, k, kind) for row in x_rows]
        products = [(w_value, x_value) for x_value in x_values for w_value in w_values]
        return [_fma(builder, *product, total) for product, total in zip(products, sums, strict=True)]

    return _loop(builder, start, stop, LANES if kind is _VECTOR else 1, sums, add_products)


def _loop(builder, start, stop, step, sums, body):
    """for i in range(start, stop, step): sums = body(i, sums)."""
    before = builder.block
    head, inside, done = (builder.append_basic_block(f"tile_{name}") for name in ("head", "inside", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(_I64)
    i.add_incoming(start, before)
    carried = []
    for total in sums:
        carried.append(builder.phi(total.type))
        carried[-1].add_incoming(total, before)
    builder.cbranch(builder.icmp_signed("<", i, stop), inside, done)
    builder.position_at_end(inside)
    totals = body(i, carried)
    i.add_incoming(builder.add(i, ir.Constant(_I64, step)), inside)
    for phi, total in zip(carried, totals, strict=True):
        phi.add_incoming(total, inside)
    builder.branch(head)
    builder.position_at_end(done)
    return carried


def _ask_for(builder, address):
    """Starts to bring a cache line to L2; no address is wrong."""
    void_pointer, word = cgutils.voidptr_t, ir.IntType(32)
    signature = ir.FunctionType(ir.VoidType(), [void_pointer, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    to_read, to_l2, data = (ir.Constant(word, n) for n in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, void_pointer), to_read, to_l2, data])


def _load(builder, row, k, kind):
    place = builder.gep(row, [k])
    if kind is _F32:
        return builder.load(place)
    loaded = builder.load(builder.bitcast(place, kind.as_pointer()))
    loaded.align = 4
    return loaded


def _spread(builder, value, kind):
    """A float in all lanes."""
    if kind is _F32:
        return value
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), order)


def _fma(builder, a, b, c):
    name = "llvm.fma.f32" if a.type is _F32 else f"llvm.fma.v{LANES}f32"
    signature = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [a, b, c])


def _add_lanes(builder, vector):
    signature = ir.FunctionType(_F32, [_F32, _VECTOR])
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    # "reassoc" lets the lanes be added as a tree.
    return builder.call(function, [ir.Constant(_F32, -0.0), vector], fastmath=["reassoc"])


tile_1, tile_2, tile_3, tile_4 = (_make_tile(num_columns) for num_columns in (1, 2, 3, 4))
mix_1, mix_2, mix_3, mix_4 = (_make_mix(num_columns, _VECTOR) for num_columns in (1, 2, 3, 4))
mix_1_narrow = _make_mix(1, _F32)
