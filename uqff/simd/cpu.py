"""What some CPUs do in one instruction and others not at all: narrow floats, and looking numbers up.

Each goes with a flag, and only code that has looked at it may be compiled: see :mod:`uqff.simd.output`.

===============================  ===============  =================================================================
``half_bits``                    ``HAS_HALF``     ``(F32) -> I32``: rounded to float16
``half_values`` ``half_value``   ``HAS_HALF``     ``(I32) -> F32``, ``(uint16) -> float32``: the reverse
``half_splat``                   ``HAS_HALF``     ``(uint16) -> F32``: 16 copies of the value
``lo_f16_to_f32`` ``hi_...``     ``HAS_HALF``     ``(U16) -> F32``: the values of the first or last 16 float16s
``bfloat_bits``                  ``HAS_BF16``     ``(F32, F32) -> U16``: rounded to bfloat16, but for subnormal ones
``permute``                      ``HAS_PERMUTE``  ``(F32, I32) -> F32``: the lanes that the low four bits name
===============================  ===============  =================================================================
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core.registry import cpu_target

from uqff.simd.vectors import F32, I32, LANES, U16, broadcast, intrinsic, signature

__all__ = [
    "HAS_BF16",
    "HAS_HALF",
    "HAS_PERMUTE",
    "bfloat_bits",
    "half_bits",
    "half_splat",
    "half_value",
    "half_values",
    "hi_f16_to_f32",
    "lo_f16_to_f32",
    "permute",
]


class BFloatType(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloatType)

    def __hash__(self) -> int:
        return hash(BFloatType)


def _of(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


_FLOATS, _HALVES, _INTS, _SHORTS = (
    _of(element) for element in (ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16))
)


def abilities() -> tuple[bool, bool, bool]:
    """Whether the CPU converts float16, rounds to bfloat16, looks up.

    Where it does not convert float16, LLVM would call a function that may not exist. Of the ways to round to bfloat16
    AVX-512's is meant, which LLVM before 17 declared for other types.
    """
    triple, _, listed = cpu_target.target_context.codegen().magic_tuple()[:3]
    features = listed.split(",")
    half = "+f16c" in features or triple.startswith(("aarch64", "arm64"))
    return half, "+avx512bf16" in features and binding.llvm_version_info >= (17,), "+avx512f" in features


HAS_HALF, HAS_BF16, HAS_PERMUTE = abilities()


@intrinsic
def half_bits(_typing: Any, vector: Any) -> Any:
    """The nearest float16s, ties to even, as bits."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(builder.fptrunc(args[0], _HALVES), _SHORTS), _INTS)

    return (signature(I32, F32), generate) if vector is F32 else None


@intrinsic
def half_value(_typing: Any, bits: Any) -> Any:
    """The value of one float16."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return (signature(types.float32, types.uint16), generate) if bits == types.uint16 else None


@intrinsic
def half_splat(_typing: Any, bits: Any) -> Any:
    """16 copies of the value of one float16; right out of memory this is one instruction with AVX-512."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.fpext(broadcast(builder, [builder.bitcast(args[0], ir.HalfType())]), _FLOATS)

    return (signature(F32, types.uint16), generate) if bits == types.uint16 else None


@intrinsic
def half_values(_typing: Any, bits: Any) -> Any:
    """The values of 16 float16 bit patterns."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(builder.trunc(args[0], _SHORTS), _HALVES), _FLOATS)

    return (signature(F32, I32), generate) if bits is I32 else None


def _halves(start: int) -> Any:
    def halves(_typing: Any, words: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            lanes = ir.Constant(_INTS, list(range(start, start + LANES)))
            half = builder.shuffle_vector(args[0], args[0], lanes)
            return builder.fpext(builder.bitcast(half, _HALVES), _FLOATS)

        return (signature(F32, U16), generate) if words is U16 else None

    return intrinsic(halves)


lo_f16_to_f32, hi_f16_to_f32 = _halves(0), _halves(LANES)


@intrinsic
def bfloat_bits(_typing: Any, a: Any, b: Any) -> Any:
    """The nearest bfloat16s of both, ties to even, as bits; zeros for numbers below 2**-126."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        rounding = ir.FunctionType(ir.VectorType(BFloatType(), 2 * LANES), [_FLOATS, _FLOATS])
        name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        rounded = builder.call(builder.module.declare_intrinsic(name, (), rounding), args[::-1])  # upper half first
        return builder.bitcast(rounded, ir.VectorType(ir.IntType(16), 2 * LANES))

    return (signature(U16, F32, F32), generate) if a is F32 and b is F32 else None


@intrinsic
def permute(_typing: Any, table: Any, indices: Any) -> Any:
    """The lanes of a table that the lowest four bits of the indices name."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        permuting = ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
        return builder.call(builder.module.declare_intrinsic("llvm.x86.avx512.permvar.sf.512", (), permuting), args)

    return (signature(F32, F32, I32), generate) if table is F32 and indices is I32 else None
