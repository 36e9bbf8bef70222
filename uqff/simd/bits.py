"""Numbers by their bits, one at a time: reinterpreted floats, narrow floats, codes packed within 64 bits.

All are inlined into the loops that use them; all but those of float16 are branch-free and written so that those loops
vectorise.  :mod:`uqff.simd.output` has what takes 16 at a time, :mod:`uqff.simd.arithmetic` what rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from uqff.simd.compiling import inline

__all__ = ["MAGNITUDE", "bf16_bits", "bits_of", "copy32", "e4m3_code", "f16_bits", "f16_value", "float_of", "pack8"]

MAGNITUDE = np.uint32(0x7FFFFFFF)

E4M3_TOP = np.uint32(0x43E00000)
"""448.0"""
E4M3_NORMAL = np.uint32(0x3C800000)
"""2^-6, the smallest normal e4m3."""
E4M3_REBIAS = np.uint32((127 - 7) << 3)
UNITS_OF_2_9 = np.float32(2.0**14)
"""A float32 in [2^14, 2^15) counts in units of 2^-9: adding it rounds to a multiple of these, ties to even."""
UNITS_OF_2_9_BITS = np.uint32(0x46800000)


def _bits_of(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


def _float_of(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


def _copy32(typingctx: Any, target: Any, to: Any, source: Any, start: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, to, source, start = args
        vector = ir.VectorType(ir.IntType(8), 32).as_pointer()

        def at(array: Any, kind: Any, offset: Any) -> Any:
            data = context.make_array(kind)(context, builder, array).data
            return builder.bitcast(builder.gep(data, [offset]), vector)

        moved = builder.load(at(source, signature.args[2], start), align=1)
        builder.store(moved, at(target, signature.args[0], to), align=1)
        return context.get_dummy_value()

    return types.none(target, types.intp, source, types.intp), codegen


bits_of: Any = intrinsic(_bits_of)
"""``bits_of(x)``: the bits of a float32, as uint32."""

float_of: Any = intrinsic(_float_of)
"""``float_of(bits)``: the float32 that has the bits of a uint32."""

copy32: Any = intrinsic(_copy32)
"""``copy32(target, to, source, start)`` on uint8 vectors: ``target[to:to + 32] = source[start:start + 32]``, unchecked.

One load and one store of whatever width the CPU has; a loop would copy byte by byte, for fear of overlap.
"""


@inline
def bf16_bits(bits: Any) -> Any:
    """The bits of a float32, not a NaN, rounded to bfloat16: the low 16 are zero."""
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)


@inline
def f16_bits(x: Any) -> Any:
    """The bits, as int64, of the float16 nearest to a float32, ties to even; 65520 and beyond are infinite."""
    bits = np.int64(bits_of(x))
    sign = (bits >> 16) & 0x8000
    bits &= 0x7FFFFFFF
    if bits > 0x7F800000:
        return sign | 0x7E00 | (bits >> 13 & 0x3FF)
    if bits >= 0x477FF000:
        return sign | 0x7C00
    if bits >= 0x38800000:
        return sign | (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13
    # Subnormal: in units of 2^-24 what the addition of 0.5 leaves in the low bits of its sum, rounded by the addition.
    return sign | (np.int64(bits_of(float_of(np.uint32(bits)) + np.float32(0.5))) - 0x3F000000)


@inline
def f16_value(bits: Any) -> Any:
    """The float32 of the bits of a float16, given as int64; NaN becomes 0x7FC00000."""
    sign, magnitude = (bits & 0x8000) << 16, bits & 0x7FFF
    if magnitude >= 0x7C00:
        return float_of(np.uint32(0x7FC00000 if magnitude > 0x7C00 else sign | 0x7F800000))
    if magnitude >= 0x0400:
        return float_of(np.uint32(sign | (magnitude << 13) + (112 << 23)))
    value = np.float32(magnitude) * np.float32(2.0**-24)
    return -value if sign else value


@inline
def e4m3_code(bits: Any) -> Any:
    """The e4m3 code, as uint32, of a float32 given by its bits: nearest, ties to even, 448 and beyond 0x7E, NaN 0xFF.

    ::

        float32  s eeeeeeee mmm|mmmmmmmmmmmmmmmmmmmm
        e4m3     s     eeee mmm|                         e less 120; below 2^-6 units of 2^-9 are counted instead
    """
    magnitude = bits & MAGNITUDE
    low = min(magnitude, E4M3_TOP)
    odd = (low >> np.uint32(20)) & np.uint32(1)
    normal = ((low + np.uint32(0x7FFFF) + odd) >> np.uint32(20)) - E4M3_REBIAS
    subnormal = bits_of(float_of(low) + UNITS_OF_2_9) - UNITS_OF_2_9_BITS
    code = (subnormal if low < E4M3_NORMAL else normal) | ((bits >> np.uint32(24)) & np.uint32(0x80))
    return np.uint32(0xFF) if magnitude > np.uint32(0x7F800000) else code


@inline
def pack8(codes: Any, bits: Any) -> Any:
    """Eight codes, one in each byte of a uint64, moved together into the lowest ``8 * bits`` bits, the first lowest.

    Three steps halve the number of gaps. With 3 bits, two of the four 16-bit parts shown::

        .....ddd.....ccc  .....bbb.....aaa    pairs close up within 16 bits
        ..........dddccc  ..........bbbaaa    then within 32 bits
        ................  ....dddcccbbbaaa    then within 64
    """
    one = np.uint64(bits)
    codes = (codes & np.uint64(0x00FF00FF00FF00FF)) | ((codes & np.uint64(0xFF00FF00FF00FF00)) >> (np.uint64(8) - one))
    codes = (codes & np.uint64(0x0000FFFF0000FFFF)) | (
        (codes & np.uint64(0xFFFF0000FFFF0000)) >> (np.uint64(16) - np.uint64(2) * one)
    )
    return (codes & np.uint64(0x00000000FFFFFFFF)) | (
        (codes & np.uint64(0xFFFFFFFF00000000)) >> (np.uint64(32) - np.uint64(4) * one)
    )
