"""Dot products of small integers, exact: codes of weights with the codes of activations.

Registers of eight lanes, because that is what one instruction of AVX2 leaves: lane l has the codes 4l to 4l + 3 of 32.

===================  ===================================================================================
``quads``            ``(U8, U8) -> I32_8``: unsigned codes times signed ones
``scaled_quads``     ``(U8, U8, I16) -> I32_8``: the same, times a scale for each two codes
``signed_quads``     ``(U8, U8) -> I32_8``: signed codes times signed ones
``pairs``            ``(I16, I16) -> I32_8``: products of 16 words, two to a lane
``word_of_halves``   ``(I16, i) -> I16``: word i of each half, for the 16 codes of that half; ``i`` is a constant
``evens_and_odds``   ``(I16) -> I16``: words 0, 2, ... 14, then 1, 3, ... 15
``first_half_twice`` ``(I16) -> I16``: words 0 to 7, twice
``last_half_doubled`` ``(I16) -> I16``: words 8, 8, 9, 9, ... 15, 15
``load_codes``       ``(bytes, at) -> U8``, from any address
``load_words``       ``(bytes, at) -> I16``, likewise
``load_u8_words``    ``(bytes, at) -> I16``: 16 bytes, widened; and ``load_i8_words``
``load_twice``       ``(bytes, at) -> U8``: 16 bytes, and once more
``picker``           a function ``(U8) -> I32_8``: chosen ones of such 16 bytes
``shifter``          a function ``(I32_8) -> I32_8``: lanes shifted right, each by a number of its own
``masker``           a function ``(I32_8) -> I32_8``: some bits of each lane
``as_words``         ``(I32_8) -> I16``: the same bits
``signed_high_bytes`` ``(I32_8) -> I16``: of each two bytes the second, as a signed number
``load_sums``        ``(bytes, at) -> I32_8``, likewise
``store_sums``       ``(bytes, at, I32_8)``, likewise
``to_floats``        ``(I32_8) -> F32_8``
``spread_8``         ``(float32) -> F32_8``
``total_8``          ``(F32_8) -> float32``: lanes four apart are added, then two, then one
``half_8``           ``(bytes, at, float32) -> F32_8``: a float16 times a number, eight times
``two_halves_8``     ``(bytes, at, float32) -> (F32_8, F32_8)``: likewise, and the next one
===================  ===================================================================================

What has activations for its second argument takes those of several rows, too, that :func:`load_codes` and the like load
from a tuple of arrays; then its result has the sums of as many rows, of which ``of_row`` takes one.  So what there is
to do for a code is done once for all of them.

Unsigned codes are below 128 and signed ones above -128 on one side, so that no sum of two products leaves 16 bits.
All are the same numbers on every CPU.  AVX2 has instructions for them, which LLVM is told by name, and VNNI has one for
``quads``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from uqff.simd.compiling import inline
from uqff.simd.cpu import HAS_HALF
from uqff.simd.load_store import _address, _is_array
from uqff.simd.output import f16
from uqff.simd.vectors import (
    F32_8,
    I16,
    I16_ROWS,
    I32,
    I32_8,
    I32_8_ROWS,
    LANES,
    LLVM,
    ROWS,
    U8,
    U8_ROWS,
    broadcast,
    intrinsic,
    shuffled,
    signature,
)

__all__ = [
    "as_words",
    "evens_and_odds",
    "first_half_twice",
    "half_8",
    "last_half_doubled",
    "load_codes",
    "load_i8_words",
    "load_sums",
    "load_twice",
    "load_u8_words",
    "load_words",
    "masker",
    "of_row",
    "pairs",
    "picker",
    "quads",
    "scaled_quads",
    "shifter",
    "signed_high_bytes",
    "signed_quads",
    "spread_8",
    "store_sums",
    "to_floats",
    "total_8",
    "two_halves_8",
    "word_of_halves",
]


def _abilities() -> tuple[bool, bool]:
    """Whether the CPU has AVX2; whether it adds four products up in one instruction, of AVX-512 or without it."""
    features = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    return "+avx2" in features, "+avxvnni" in features or {"+avx512vnni", "+avx512vl"} <= features


HAS_AVX2, HAS_VNNI = _abilities()

_BYTES, _WORDS, _SUMS, _FLOATS = LLVM[U8], LLVM[I16], LLVM[I32_8], LLVM[F32_8]
_TWICE = ir.VectorType(ir.IntType(16), 2 * LANES)
_WIDE = LLVM[I32]


def _kept(builder: Any, vector: Any) -> Any:
    """The same, but LLVM does not see from what it comes: it would make two shuffles of one behind another one."""
    if not HAS_AVX2:
        return vector
    same = ir.FunctionType(vector.type, [vector.type])
    return builder.asm(same, "", "=x,0", [vector], False)


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


_SEVERAL = {U8: U8_ROWS, I16: I16_ROWS, I32_8: I32_8_ROWS}


def _parts(builder: Any, rows: Any) -> list[Any]:
    """The vectors of the rows that lie beside each other."""
    lanes = rows.type.count // ROWS
    return [shuffled(builder, rows, rows, list(range(lanes * i, lanes * (i + 1)))) for i in range(ROWS)]


def _beside(builder: Any, parts: list[Any]) -> Any:
    """Vectors of as many rows, beside each other."""
    while len(parts) > 1:
        lanes = list(range(2 * parts[0].type.count))
        parts = [shuffled(builder, parts[i], parts[i + 1], lanes) for i in range(0, len(parts), 2)]
    return parts[0]


def _products(work: Callable[..., Any], *given: Any) -> Any:
    """``(builder, *given) -> I32_8``, of which the second are activations; with those of several rows, of as many."""
    several = (given[0], _SEVERAL[given[1]], *given[2:])

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return work(builder, *args)

    def generate_several(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        first, rows, *others = args
        return _beside(builder, [work(builder, first, row, *others) for row in _parts(builder, rows)])

    def typed(*args: Any) -> Any:
        if args == several:
            return signature(I32_8_ROWS, *several), generate_several
        return (signature(I32_8, *given), generate) if args == given else None

    # numba wants to know how many there are.
    def multiply(_typing: Any, codes: Any, others: Any) -> Any:
        return typed(codes, others)

    def multiply_scaled(_typing: Any, codes: Any, others: Any, scales: Any) -> Any:
        return typed(codes, others, scales)

    return intrinsic(multiply if len(given) == 2 else multiply_scaled)


quads = _products(_quads, U8, U8)
"""Codes below 128 times signed codes."""


def _scaled_quads(builder: Any, codes: Any, others: Any, scales: Any) -> Any:
    return _word_products(builder, _byte_products(builder, codes, others), scales)


scaled_quads = _products(_scaled_quads, U8, U8, I16)
"""Codes below 128 times signed codes; each two products are multiplied with the scale of their lane."""


def _signed_quads(builder: Any, codes: Any, others: Any) -> Any:
    if HAS_AVX2:
        function = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
        sign = builder.module.declare_intrinsic("llvm.x86.avx2.psign.b", (), function)
        return _quads(builder, builder.call(sign, [codes, codes]), builder.call(sign, [others, codes]))
    zero = ir.Constant(_BYTES, [0] * 2 * LANES)
    negative = builder.icmp_signed("<", codes, zero)
    magnitudes = builder.select(negative, builder.sub(zero, codes), codes)
    signed = builder.select(negative, builder.sub(zero, others), others)
    return _quads(builder, magnitudes, signed)


signed_quads = _products(_signed_quads, U8, U8)
"""Signed codes times signed codes, of which the others are never -128: magnitudes times what has their sign."""

pairs = _products(_word_products, I16, I16)
"""The products of 16 signed words, two to a lane."""


@intrinsic
def of_row(_typing: Any, rows: Any, at: Any) -> Any:
    """The sums of one of several rows."""

    def generate(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _parts(builder, args[0])[sig.args[1].literal_value]

    fits = rows is I32_8_ROWS and isinstance(at, types.IntegerLiteral)
    return (signature(I32_8, I32_8_ROWS, at), generate) if fits else None


@intrinsic
def word_of_halves(_typing: Any, words: Any, at: Any) -> Any:
    """Eight copies of one of the first eight words, then of the same one of the last eight."""

    def generate(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lane, half = sig.args[1].literal_value, LANES // 2
        return shuffled(builder, args[0], args[0], [lane] * half + [half + lane] * half)

    fits = words is I16 and isinstance(at, types.IntegerLiteral)
    return (signature(I16, I16, at), generate) if fits else None


def _arranged(lanes: Sequence[int]) -> Any:
    def arrange(_typing: Any, words: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            return _kept(builder, shuffled(builder, args[0], args[0], list(lanes)))

        return (signature(I16, I16), generate) if words is I16 else None

    return intrinsic(arrange)


evens_and_odds = _arranged([*range(0, LANES, 2), *range(1, LANES, 2)])
first_half_twice = _arranged([*range(LANES // 2)] * 2)
last_half_doubled = _arranged([LANES // 2 + i // 2 for i in range(LANES)])


@intrinsic
def as_words(_typing: Any, lanes: Any) -> Any:
    """The same bits."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _WORDS)

    return (signature(I16, I32_8), generate) if lanes is I32_8 else None


@intrinsic
def load_twice(_typing: Any, array: Any, at: Any) -> Any:
    """16 bytes, and once more."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        given = ir.VectorType(ir.IntType(8), LANES)
        packed = builder.load(_address(context, builder, sig.args[0], args[0], args[1], given), align=1)
        return _kept(builder, shuffled(builder, packed, packed, [*range(LANES)] * 2))

    return (signature(U8, array, types.intp), generate) if _is_array(array) else None


def picker(chosen: Sequence[int | None]) -> Any:
    """``(U8) -> I32_8``: 32 bytes of what :func:`load_twice` gives, by their numbers below 16; zero for None."""
    # Those of a half of the register from that half.
    lanes = [2 * LANES if each is None else each + i // LANES * LANES for i, each in enumerate(chosen)]

    def pick(_typing: Any, twice: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            return builder.bitcast(shuffled(builder, args[0], ir.Constant(_BYTES, [0] * 2 * LANES), lanes), _SUMS)

        return (signature(I32_8, U8), generate) if twice is U8 else None

    return intrinsic(pick)


@intrinsic
def signed_high_bytes(_typing: Any, lanes: Any) -> Any:
    """Of each two bytes the second, as a signed word."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.ashr(builder.bitcast(args[0], _WORDS), ir.Constant(_WORDS, [8] * LANES))

    return (signature(I16, I32_8), generate) if lanes is I32_8 else None


def _with_constants(instruction: str, numbers: Sequence[int]) -> Any:
    def work(_typing: Any, lanes: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            return getattr(builder, instruction)(args[0], ir.Constant(_SUMS, list(numbers)))

        return (signature(I32_8, I32_8), generate) if lanes is I32_8 else None

    return intrinsic(work)


def shifter(bits: Sequence[int]) -> Any:
    """``(I32_8) -> I32_8``: each lane shifted right by so many bits."""
    return _with_constants("lshr", bits)


def masker(bits: Sequence[int]) -> Any:
    """``(I32_8) -> I32_8``: these bits of each lane."""
    return _with_constants("and_", bits)


def _loader(result: Any) -> Any:
    def load(_typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load(_address(context, builder, sig.args[0], args[0], args[1], LLVM[result]), align=1)

        def generate_several(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            arrays = [builder.extract_value(args[0], i) for i in range(ROWS)]
            places = [_address(context, builder, sig.args[0].dtype, each, args[1], LLVM[result]) for each in arrays]
            return _beside(builder, [builder.load(place, align=1) for place in places])

        if isinstance(array, types.UniTuple) and array.count == ROWS and _is_array(array.dtype):
            return signature(_SEVERAL[result], array, types.intp), generate_several
        return (signature(result, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(load)


load_codes, load_words, load_sums = _loader(U8), _loader(I16), _loader(I32_8)


def _widening_loader(widen: str) -> Any:
    def load(_typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            given = ir.VectorType(ir.IntType(8), LANES)
            pointer = _address(context, builder, sig.args[0], args[0], args[1], given)
            return getattr(builder, widen)(builder.load(pointer, align=1), _WORDS)

        return (signature(I16, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(load)


load_u8_words, load_i8_words = _widening_loader("zext"), _widening_loader("sext")


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


def _half_loader(count: int) -> Any:
    """So many float16s, in turn, as eight floats."""

    def load(_typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            bits = ir.IntType(16 * count)
            given = builder.load(_address(context, builder, sig.args[0], args[0], args[1], bits), align=1)
            # The bits are copied before they are converted: one instruction each.
            copies = broadcast(builder, [given], LANES // 2 // count)
            halves = builder.bitcast(copies, ir.VectorType(ir.HalfType(), LANES // 2))
            return builder.fpext(halves, _FLOATS)

        return (signature(F32_8, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(load)


_one_half, _halves_in_turn = _half_loader(1), _half_loader(2)


def _twice(parity: int) -> Any:
    def twice(_typing: Any, lanes: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            return shuffled(builder, args[0], args[0], [i // 2 * 2 + parity for i in range(LANES // 2)])

        return (signature(F32_8, F32_8), generate) if lanes is F32_8 else None

    return intrinsic(twice)


_evens_twice, _odds_twice = _twice(0), _twice(1)


@inline
def _half_8_by_cpu(data: Any, at: Any, factor: Any) -> Any:
    return _one_half(data, at) * factor


@inline
def _half_8_by_bits(data: Any, at: Any, factor: Any) -> Any:
    return spread_8(f16(data, at) * factor)


half_8 = _half_8_by_cpu if HAS_HALF else _half_8_by_bits
"""``half_8(data, at, factor)``; a NaN may keep its payload, here and below."""


@inline
def _two_halves_8_by_cpu(data: Any, at: Any, factor: Any) -> Any:
    both = _halves_in_turn(data, at) * factor
    return _evens_twice(both), _odds_twice(both)


@inline
def _two_halves_8_by_bits(data: Any, at: Any, factor: Any) -> Any:
    return spread_8(f16(data, at) * factor), spread_8(f16(data, at + 2) * factor)


two_halves_8 = _two_halves_8_by_cpu if HAS_HALF else _two_halves_8_by_bits
