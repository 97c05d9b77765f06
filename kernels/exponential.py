"""exp(x) for loops that the compiler vectorises, and for vector code by hand; libm's is a call per number.

exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2; exp(r) by a polynomial of degree 6 (Cephes' coefficients).
Relative error below 3e-7 for -87 <= x <= 88; x is clamped to that range.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.vectors import F32, LANES, VECTOR, fma

_COEFFICIENTS = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip


def emit_exponential(builder, x):
    """Code for exp of a float or of a vector of LANES; both round alike."""
    kind, integer = x.type, ir.IntType(32)
    words = ir.VectorType(integer, LANES) if kind is VECTOR else integer

    def number(value):
        return ir.Constant(kind, [value] * LANES if kind is VECTOR else value)

    def word(value):
        return ir.Constant(words, [value] * LANES if kind is VECTOR else value)

    x = builder.select(builder.fcmp_ordered(">", x, number(-87.0)), x, number(-87.0))
    x = builder.select(builder.fcmp_ordered("<", x, number(88.0)), x, number(88.0))
    name = "llvm.floor.f32" if kind is F32 else f"llvm.floor.v{LANES}f32"
    floor = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name)
    n = builder.call(floor, [fma(builder, x, number(1.44269504), number(0.5))])
    # ln 2 in two parts, of which the first is exact in few bits.
    r = fma(builder, n, number(-0.693359375), x)
    r = fma(builder, n, number(2.12194440e-4), r)
    p = number(_COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        p = fma(builder, p, r, number(coefficient))
    p = builder.fadd(fma(builder, p, builder.fmul(r, r), r), number(1.0))
    exponent = builder.shl(builder.add(builder.fptosi(n, words), word(127)), word(23))
    return builder.fmul(p, builder.bitcast(exponent, kind))


@intrinsic
def _exponential(_typing, x):
    def generate(_context, builder, _signature, values):
        return emit_exponential(builder, values[0])

    return types.float32(types.float32), generate


@njit("float32(float32)", cache=True, nogil=True)
def exponential(x):
    return _exponential(x)
