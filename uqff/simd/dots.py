"""Dot products of small integers, exact: codes of weights with the codes of activations.

Registers of eight lanes, because that is what one instruction of AVX2 leaves: lane l has the codes 4l to 4l + 3 of 32.

===================  ===================================================================================
``quads``            ``(U8, U8) -> I32_8``: unsigned codes times signed ones
``scaled_quads``     ``(U8, U8, I16) -> I32_8``: the same, times a scale for each two codes
``signed_quads``     ``(U8, U8) -> I32_8``: signed codes times signed ones
``pairs``            ``(I16, I16) -> I32_8``: products of 16 words, two to a lane
``word``             ``(I16, i) -> I16``: word i for all 32 codes; ``i`` is a constant, here and below
``two_words``        ``(I16, i) -> I16``: word i for the first 16 codes, word i + 1 for the others
``last_twice``       ``(I16) -> I16``: each of the last eight words twice
``load_words``       ``(bytes, at) -> I16``, from any address
``load_sums``        ``(bytes, at) -> I32_8``, likewise
``store_sums``       ``(bytes, at, I32_8)``, likewise
``to_floats``        ``(I32_8) -> F32_8``
``spread_8``         ``(float32) -> F32_8``
``total_8``          ``(F32_8) -> float32``: lanes four apart are added, then two, then one
``halved_words``     ``(I32) -> I16``: the low halves of 16 numbers
===================  ===================================================================================

Unsigned codes are below 128 and signed ones above -128 on one side, so that no sum of two products leaves 16 bits.
All are the same numbers on every CPU.  AVX2 has instructions for them, which LLVM is told by name, and VNNI has one for
``quads``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from uqff.simd.load_store import _address, _is_array
from uqff.simd.vectors import F32_8, I16, I32, I32_8, LANES, LLVM, U8, broadcast, intrinsic, shuffled, signature

__all__ = [
    "halved_words",
    "last_twice",
    "load_sums",
    "load_words",
    "pairs",
    "quads",
    "scaled_quads",
    "signed_quads",
    "spread_8",
    "store_sums",
    "to_floats",
    "total_8",
    "two_words",
    "word",
]


def _abilities() -> tuple[bool, bool]:
    """Whether the CPU has AVX2; whether it adds four products up in one instruction, of AVX-512 or without it."""
    features = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    return "+avx2" in features, "+avxvnni" in features or {"+avx512vnni", "+avx512vl"} <= features


HAS_AVX2, HAS_VNNI = _abilities()

_BYTES, _WORDS, _SUMS, _FLOATS = LLVM[U8], LLVM[I16], LLVM[I32_8], LLVM[F32_8]
_TWICE = ir.VectorType(ir.IntType(16), 2 * LANES)
_WIDE = LLVM[I32]


def _two_by_two(builder: Any, products: Any) -> Any:
    """Neighbours added."""
    count = products.type.count
    even, odd = (shuffled(builder, products, products, list(range(parity, count, 2))) for parity in (0, 1))
    return builder.add(even, odd)


def _byte_products(builder: Any, codes: Any, others: Any) -> Any:
    """Unsigned bytes times signed ones, two to a word."""
    if HAS_AVX2:
        function = ir.FunctionType(_WORDS, [_BYTES, _BYTES])
        name = "llvm.x86.avx2.pmadd.ub.sw"
        return builder.call(builder.module.declare_intrinsic(name, (), function), [codes, others])
    return _two_by_two(builder, builder.mul(builder.zext(codes, _TWICE), builder.sext(others, _TWICE)))


def _word_products(builder: Any, a: Any, b: Any) -> Any:
    """Signed words times signed words, two to a lane."""
    if HAS_AVX2:
        function = ir.FunctionType(_SUMS, [_WORDS, _WORDS])
        return builder.call(builder.module.declare_intrinsic("llvm.x86.avx2.pmadd.wd", (), function), [a, b])
    return _two_by_two(builder, builder.mul(builder.sext(a, _WIDE), builder.sext(b, _WIDE)))


def _quads(builder: Any, codes: Any, others: Any) -> Any:
    """Unsigned bytes times signed ones, four to a lane."""
    if HAS_VNNI:
        # By the types that it had up to LLVM 21; where it has others, LLVM changes it when it reads it.
        function = ir.FunctionType(_SUMS, [_SUMS] * 3)
        add = builder.module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.256", (), function)
        given = (builder.bitcast(each, _SUMS) for each in (codes, others))
        return builder.call(add, [ir.Constant(_SUMS, [0] * (LANES // 2)), *given])
    return _word_products(builder, _byte_products(builder, codes, others), ir.Constant(_WORDS, [1] * LANES))


@intrinsic
def quads(_typing: Any, codes: Any, others: Any) -> Any:
    """Codes below 128 times signed codes."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return _quads(builder, *args)

    return (signature(I32_8, U8, U8), generate) if codes is U8 and others is U8 else None


@intrinsic
def scaled_quads(_typing: Any, codes: Any, others: Any, scales: Any) -> Any:
    """Codes below 128 times signed codes; each two products are multiplied with the scale of their lane."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return _word_products(builder, _byte_products(builder, args[0], args[1]), args[2])

    return (signature(I32_8, U8, U8, I16), generate) if (codes, others, scales) == (U8, U8, I16) else None


@intrinsic
def signed_quads(_typing: Any, codes: Any, others: Any) -> Any:
    """Signed codes times signed codes, of which the others are never -128: magnitudes times what has their sign."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        codes, others = args
        zero = ir.Constant(_BYTES, [0] * 2 * LANES)
        negative = builder.icmp_signed("<", codes, zero)
        magnitudes = builder.select(negative, builder.sub(zero, codes), codes)
        signed = builder.select(negative, builder.sub(zero, others), others)
        return _quads(builder, magnitudes, signed)

    return (signature(I32_8, U8, U8), generate) if codes is U8 and others is U8 else None


@intrinsic
def pairs(_typing: Any, a: Any, b: Any) -> Any:
    """The products of 16 signed words, two to a lane."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return _word_products(builder, *args)

    return (signature(I32_8, I16, I16), generate) if a is I16 and b is I16 else None


@intrinsic
def two_words(_typing: Any, words: Any, first: Any) -> Any:
    """Eight copies each of two words that follow each other, of 16."""

    def generate(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lane = sig.args[1].literal_value
        return shuffled(builder, args[0], args[0], [lane] * (LANES // 2) + [lane + 1] * (LANES // 2))

    fits = words is I16 and isinstance(first, types.IntegerLiteral)
    return (signature(I16, I16, first), generate) if fits else None


@intrinsic
def word(_typing: Any, words: Any, at: Any) -> Any:
    """16 copies of one of 16 words."""

    def generate(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return shuffled(builder, args[0], args[0], [sig.args[1].literal_value] * LANES)

    fits = words is I16 and isinstance(at, types.IntegerLiteral)
    return (signature(I16, I16, at), generate) if fits else None


@intrinsic
def last_twice(_typing: Any, words: Any) -> Any:
    """Words 8, 8, 9, 9, ... 15, 15 of 16."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return shuffled(builder, args[0], args[0], [LANES // 2 + i // 2 for i in range(LANES)])

    return (signature(I16, I16), generate) if words is I16 else None


@intrinsic
def halved_words(_typing: Any, numbers: Any) -> Any:
    """The low halves of 16 numbers."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.trunc(args[0], _WORDS)

    return (signature(I16, I32), generate) if numbers is I32 else None


def _loader(result: Any) -> Any:
    def load(_typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load(_address(context, builder, sig.args[0], args[0], args[1], LLVM[result]), align=1)

        return (signature(result, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(load)


load_words, load_sums = _loader(I16), _loader(I32_8)


@intrinsic
def store_sums(_typing: Any, array: Any, at: Any, sums: Any) -> Any:
    """Eight sums to bytes at any address."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, sig.args[0], args[0], args[1], _SUMS), align=1)
        return context.get_dummy_value()

    fits = _is_array(array) and sums is I32_8
    return (signature(types.none, array, types.intp, I32_8), generate) if fits else None


@intrinsic
def to_floats(_typing: Any, sums: Any) -> Any:
    """Sums as floats, rounded to nearest."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], _FLOATS)

    return (signature(F32_8, I32_8), generate) if sums is I32_8 else None


@intrinsic
def spread_8(_typing: Any, value: Any) -> Any:
    """Eight copies of a float."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return broadcast(builder, [args[0]], LANES // 2)

    return (signature(F32_8, types.float32), generate) if value == types.float32 else None


@intrinsic
def total_8(_typing: Any, lanes: Any) -> Any:
    """The sum of eight lanes: halves are added until one is left."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        sums, n = args[0], LANES // 2
        while n > 1:
            n //= 2
            sums = builder.fadd(
                shuffled(builder, sums, sums, list(range(n))), shuffled(builder, sums, sums, list(range(n, 2 * n)))
            )
        return builder.extract_element(sums, ir.Constant(ir.IntType(32), 0))

    return (signature(types.float32, F32_8), generate) if lanes is F32_8 else None
