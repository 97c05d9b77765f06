"""LLVM vector code by hand: what `panel_tile`, `tile` and `softmax_row` are made of.

A vector is LANES floats: AVX-512 has 32 registers of 16; everything else gets 8 lanes, and so does what numba is told
to compile for another processor than this one (NUMBA_CPU_NAME).
"""

from pathlib import Path

import llvmlite.binding
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiled import forget_stale

forget_stale(Path(__file__).parent)
_has_avx512 = config.CPU_NAME is None and llvmlite.binding.get_host_cpu_features().get("avx512f", False)
LANES = 16 if _has_avx512 else 8
CACHE_LINE_BYTES = 64
I64, F32 = ir.IntType(64), ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)


def rows_of(builder, base, stride, num_rows):
    """Pointers to rows that lie `stride` floats apart."""
    rows = [builder.inttoptr(base, F32.as_pointer())]
    for _ in range(num_rows - 1):
        rows.append(builder.gep(rows[-1], [stride]))
    return rows


def loop(builder, start, stop, step, sums, body):
    """for i in range(start, stop, step): sums = body(i, sums)."""
    before = builder.block
    head, inside, done = (builder.append_basic_block(f"tile_{name}") for name in ("head", "inside", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(I64)
    i.add_incoming(start, before)
    carried = []
    for total in sums:
        carried.append(builder.phi(total.type))
        carried[-1].add_incoming(total, before)
    builder.cbranch(builder.icmp_signed("<", i, stop), inside, done)
    builder.position_at_end(inside)
    totals = body(i, carried)
    i.add_incoming(builder.add(i, ir.Constant(I64, step)), inside)
    for phi, total in zip(carried, totals, strict=True):
        phi.add_incoming(total, inside)
    builder.branch(head)
    builder.position_at_end(done)
    return carried


def ask_for(builder, address):
    """Starts to bring a cache line to L2; no address is wrong."""
    void_pointer, word = cgutils.voidptr_t, ir.IntType(32)
    signature = ir.FunctionType(ir.VoidType(), [void_pointer, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    to_read, to_l2, data = (ir.Constant(word, n) for n in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, void_pointer), to_read, to_l2, data])


def each_case(builder, number, most):
    """The numbers from 1 to `most`; what is built for each runs if `number` is that."""
    for case in range(1, most + 1):
        with builder.if_then(builder.icmp_signed("==", number, ir.Constant(I64, case))):
            yield case


def make_room(kind, size):
    """What gives the address of an array on the stack of the function that asks."""

    @intrinsic
    def room(_typing):
        def generate(_context, builder, _signature, _values):
            return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(kind, size)), I64)

        return types.int64(), generate

    return room


def load(builder, row, k, kind):
    place = builder.gep(row, [k])
    if kind is F32:
        return builder.load(place)
    loaded = builder.load(builder.bitcast(place, kind.as_pointer()))
    loaded.align = 4
    return loaded


def spread(builder, value, kind):
    """A float in all lanes."""
    if kind is F32:
        return value
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), order)


def fma(builder, a, b, c):
    name = "llvm.fma.f32" if a.type is F32 else f"llvm.fma.v{LANES}f32"
    signature = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [a, b, c])


def add_lanes(builder, vectors):
    """A vector that begins with the sum of each vector's lanes: halves of halves, in the same order for any number.

    Two vectors become one at each level, which takes 30 shuffles for 16 vectors where one by one takes 64.
    """
    width = LANES  # lanes of a sum
    while width > 1:
        half = width // 2
        low = [lane for start in range(0, LANES, width) for lane in range(start, start + half)]
        seconds = vectors[1::2] if len(vectors) % 2 == 0 else [*vectors[1::2], vectors[-1]]
        vectors = [
            builder.fadd(*(_pick(builder, pair, [lane + shift for lane in low]) for shift in (0, half)))
            for pair in zip(vectors[::2], seconds, strict=True)
        ]
        width = half
    return vectors[0]


def _pick(builder, pair, lanes):
    """The lanes of the first vector, then those of the second."""
    both = [*lanes, *(LANES + lane for lane in lanes)]
    return builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(ir.IntType(32), LANES), both))
