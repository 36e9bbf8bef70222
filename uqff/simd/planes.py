"""What multiplies codes with one row of activations: 64 bytes at a time, whose codes are taken out word by word.

To widen a byte to 32 bits takes a shuffle across a register, for which CPUs have few ports.  So bytes are not widened:
:func:`byte_planes` shifts each of the four bytes of sixteen words to the top in turn, where it is a signed number times
2**24, and the activations lie in the order in which the codes come out so (:data:`BYTES`).  The power of two goes into
the scale, which is multiplied with a sum of several products.

==================  ====================================================================================
``byte_planes``     ``(I32, float32s, at) -> F32``: sums of 64 signed bytes, times 2**24, times 64 activations
``nibble_planes``   the same of 128 signed nibbles, times 2**28
``weigh_four``      the same of weights, ``code * scale + minimum``, of codes in four places of each word
``in_order``        ``()``: loads before it stay before those after it
``load_pieces``     ``(bytes, at, stride, n) -> I32``: 64 bytes from n places, a stride apart
``half_pieces``     ``(bytes, at, stride, n) -> F32``: n float16s, a stride apart, each for 16 / n lanes
``spread_lanes``    ``(F32, i, j, k, l) -> F32``: four lanes, likewise
``spread``          ``(float32s, at, n) -> F32``: n numbers of an array, likewise
``joined``          ``(U8, U8) -> I32``: 64 bytes
``flipped``         ``(I32, bits) -> I32``: each word with those bits flipped
``look_up_bytes``   ``(I32, table) -> I32``: bytes below 16 replaced by those of a table, where ``HAS_AVX2``
``larger_bytes``    ``(I32, I32) -> I32``: byte by byte, unsigned
``any_byte``        ``(I32, byte) -> bool``: whether one of 64 is this one
``halved_signed``   ``(I32) -> U16``: 32 signed numbers, shifted right by one
``store_as_bytes``  ``(float32s, at, F32, F32, F32, F32)``: in the order of :data:`BYTES`
==================  ====================================================================================

The counts and lanes are constants.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from uqff.simd.compiling import inline
from uqff.simd.cpu import HAS_HALF
from uqff.simd.dots import HAS_AVX2
from uqff.simd.load_store import _address, _is_array, load_f32
from uqff.simd.output import f16
from uqff.simd.vectors import (
    F32,
    I32,
    LANES,
    LLVM,
    U8,
    U16,
    broadcast,
    halves,
    i32_to_f32,
    intrinsic,
    multiply_add,
    quarters,
    shuffled,
    signature,
    splat,
)

__all__ = [
    "BYTES",
    "HAS_AVX2",
    "PAIRS",
    "SIGNS",
    "any_byte",
    "byte_planes",
    "flipped",
    "half_pieces",
    "halved_signed",
    "in_order",
    "joined",
    "larger_bytes",
    "load_pieces",
    "look_up_bytes",
    "nibble_planes",
    "spread",
    "spread_lanes",
    "store_as_bytes",
    "weigh_four",
    "weigh_four_rounded",
]

BYTES: Final[npt.NDArray[np.int64]] = np.arange(64).reshape(LANES, 4).T.reshape(-1)
"""The order in which :func:`byte_planes` takes 64 bytes."""

_I8, _I16, _INT32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()


@intrinsic
def _byte_on_top(_typing: Any, words: Any, k: Any) -> Any:
    """A byte of each word in its highest place, above zeros: one shuffle."""

    def generate(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
        size = ir.VectorType(_I8, 64)
        bytes_, zeros = builder.bitcast(args[0], size), ir.Constant(size, [0] * 64)
        lanes = [i - 3 + sig.args[1].literal_value if i % 4 == 3 else 64 + i for i in range(64)]
        return builder.bitcast(shuffled(builder, bytes_, zeros, lanes), LLVM[I32])

    return (signature(I32, words, k), generate) if words is I32 and isinstance(k, types.IntegerLiteral) else None


@inline
def byte_planes(words, x, at):
    """Lane l: the sum of signed bytes 4 l + k, times 2**24, times activations ``at`` + 16 k + l, k from 0 to 3."""
    sums = i32_to_f32(_byte_on_top(words, 0)) * load_f32(x, at)
    sums = multiply_add(i32_to_f32(_byte_on_top(words, 1)), load_f32(x, at + LANES), sums)
    sums = multiply_add(i32_to_f32(_byte_on_top(words, 2)), load_f32(x, at + 2 * LANES), sums)
    return multiply_add(i32_to_f32(_byte_on_top(words, 3)), load_f32(x, at + 3 * LANES), sums)


@intrinsic
def in_order(_typing: Any) -> Any:
    """No load is moved from what comes after to what came before, or back: fewer registers are needed."""

    def generate(context: Any, builder: Any, _sig: Any, _args: Any) -> Any:
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)
        return context.get_dummy_value()

    return signature(types.none), generate


def _weigh_four(exact: bool) -> Any:
    """See :data:`weigh_four`."""

    @inline
    def add(codes, scale, minimum, x, at, sums):
        given = i32_to_f32(codes)
        if exact:
            return multiply_add(multiply_add(given, scale, minimum), load_f32(x, at), sums)
        return multiply_add(given * scale + minimum, load_f32(x, at), sums)

    @inline
    def weigh_four(words, step, mask, scale, minimum, x, at, a, b):
        a = add(words & mask, scale, minimum, x, at, a)
        b = add(words >> step & mask, scale, minimum, x, at + LANES, b)
        a = add(words >> 2 * step & mask, scale, minimum, x, at + 2 * LANES, a)
        return a, add(words >> 3 * step & mask, scale, minimum, x, at + 3 * LANES, b)

    return weigh_four


weigh_four, weigh_four_rounded = _weigh_four(True), _weigh_four(False)
"""``(words, step, mask, scale, minimum, x, at, a, b) -> (a, b)``: four codes of each word, as weights.

The weight, ``code * scale + minimum``, is that of the dequantiser: its product is exact, or rounded as it is there.
Code k of lane l is ``step * k`` bits up, and its weight is multiplied with activation ``at`` + 16 k + l.  Both sums get
half of them, so that none waits for the other.
"""


HIGH: Final = 0xF0F0F0F0
SIGNS: Final = 0x88888888
"""Flipped, unsigned nibbles are signed ones, 8 less."""

PAIRS: Final[npt.NDArray[np.int64]] = np.concatenate([2 * BYTES, 2 * BYTES + 1])
"""The order in which :func:`nibble_planes` takes 128 nibbles, the first of each byte the low one."""


@inline
def nibble_planes(words, x, at):
    """Signed nibbles, times 2**28: the low ones of 64 bytes with 64 activations, then the high ones with 64."""
    return byte_planes(words << 4 & HIGH, x, at) + byte_planes(words & HIGH, x, at + 64)


def _joined(builder: Any, pieces: list[Any]) -> Any:
    while len(pieces) > 1:
        lanes = list(range(2 * pieces[0].type.count))
        pieces = [shuffled(builder, pieces[i], pieces[i + 1], lanes) for i in range(0, len(pieces), 2)]
    return pieces[0]


def _places(context: Any, builder: Any, sig: Any, args: Any, pointee: ir.Type) -> list[Any]:
    """What lies at so many places of an array, a stride apart."""
    array, at, stride = args[:3]
    found = []
    for i in range(sig.args[3].literal_value):
        place = builder.add(at, builder.mul(stride, ir.Constant(stride.type, i)))
        found.append(builder.load(_address(context, builder, sig.args[0], array, place, pointee), align=1))
    return found


@intrinsic
def load_pieces(_typing: Any, array: Any, at: Any, stride: Any, n: Any) -> Any:
    """64 bytes from n places of an array of bytes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        piece = ir.VectorType(_INT32, LANES // sig.args[3].literal_value)
        return _joined(builder, _places(context, builder, sig, args, piece))

    fits = _is_array(array) and isinstance(n, types.IntegerLiteral)
    return (signature(I32, array, types.intp, types.intp, n), generate) if fits else None


@intrinsic
def _half_pieces(_typing: Any, array: Any, at: Any, stride: Any, n: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = LANES // sig.args[3].literal_value
        numbers = ir.VectorType(_FLOAT, lanes)
        bits = _places(context, builder, sig, args, _I16)
        # The bits are copied before they are converted: one instruction each.
        pieces = [builder.fpext(broadcast(builder, [builder.bitcast(each, _HALF)], lanes), numbers) for each in bits]
        return _joined(builder, pieces)

    fits = _is_array(array) and isinstance(n, types.IntegerLiteral)
    return (signature(F32, array, types.intp, types.intp, n), generate) if fits else None


@inline
def _half_pieces_by_bits(data, at, stride, n):
    if n == 1:
        return splat(f16(data, at))
    if n == 2:
        return halves(f16(data, at), f16(data, at + stride))
    return quarters(f16(data, at), f16(data, at + stride), f16(data, at + 2 * stride), f16(data, at + 3 * stride))


half_pieces = _half_pieces if HAS_HALF else _half_pieces_by_bits
"""``half_pieces(data, at, stride, n)``; a NaN may keep its payload."""


def _each_for(n: int) -> list[int]:
    return [i * n // LANES for i in range(LANES)]


@intrinsic
def spread(_typing: Any, array: Any, at: Any, n: Any) -> Any:
    """So many numbers of an array, each for as many lanes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count = sig.args[2].literal_value
        given = ir.VectorType(_FLOAT, count)
        numbers = builder.load(_address(context, builder, sig.args[0], args[0], args[1], given), align=4)
        return shuffled(builder, numbers, numbers, _each_for(count))

    fits = _is_array(array) and array.dtype == types.float32 and isinstance(n, types.IntegerLiteral)
    return (signature(F32, array, types.intp, n), generate) if fits else None


@intrinsic
def spread_lanes(_typing: Any, numbers: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four lanes of a vector, each for four."""

    def generate(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
        chosen = [lane.literal_value for lane in sig.args[1:]]
        return shuffled(builder, args[0], args[0], [chosen[i] for i in _each_for(len(chosen))])

    fits = numbers is F32 and all(isinstance(lane, types.IntegerLiteral) for lane in (a, b, c, d))
    return (signature(F32, numbers, a, b, c, d), generate) if fits else None


@intrinsic
def joined(_typing: Any, a: Any, b: Any) -> Any:
    """64 bytes, those of the first vector first."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(_joined(builder, list(args)), LLVM[I32])

    return (signature(I32, a, b), generate) if a is U8 and b is U8 else None


@intrinsic
def flipped(_typing: Any, words: Any, bits: Any) -> Any:
    """Words with the set bits of a number flipped."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        mask = context.cast(builder, args[1], sig.args[1], types.int32)
        return builder.xor(args[0], broadcast(builder, [mask]))

    return (signature(I32, words, bits), generate) if words is I32 and isinstance(bits, types.Integer) else None


@intrinsic
def look_up_bytes(_typing: Any, words: Any, table: Any) -> Any:
    """Each byte below 16 replaced by a byte of a table of 16."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        entries = ir.VectorType(_I8, 16)
        table = builder.load(_address(context, builder, sig.args[1], args[1], _zero(), entries), align=1)
        table = shuffled(builder, table, table, [*range(16), *range(16)])
        size = ir.VectorType(_I8, 32)
        function = ir.FunctionType(size, [size, size])
        look_up = builder.module.declare_intrinsic("llvm.x86.avx2.pshuf.b", (), function)
        bytes_ = builder.bitcast(args[0], ir.VectorType(_I8, 64))
        parts = [shuffled(builder, bytes_, bytes_, list(range(i, i + 32))) for i in (0, 32)]
        found = _joined(builder, [builder.call(look_up, [table, part]) for part in parts])
        return builder.bitcast(found, LLVM[I32])

    return (signature(I32, words, table), generate) if words is I32 and _is_array(table) else None


@intrinsic
def store_as_bytes(_typing: Any, array: Any, at: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """64 numbers, given one after another, to an array in the order of :data:`BYTES`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        numbers = _joined(builder, list(args[2:]))
        for k in range(4):
            place = builder.add(args[1], ir.Constant(args[1].type, LANES * k))
            pointer = _address(context, builder, sig.args[0], args[0], place, LLVM[F32])
            builder.store(shuffled(builder, numbers, numbers, BYTES[LANES * k : LANES * (k + 1)].tolist()), pointer, 4)
        return context.get_dummy_value()

    fits = _is_array(array) and array.dtype == types.float32 and a is b is c is d is F32
    return (signature(types.none, array, types.intp, a, b, c, d), generate) if fits else None


_BYTES_OF = ir.VectorType(_I8, 64)
_WORDS_OF = LLVM[U16]


@intrinsic
def larger_bytes(_typing: Any, a: Any, b: Any) -> Any:
    """Byte by byte, the larger of unsigned ones."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        a, b = (builder.bitcast(each, _BYTES_OF) for each in args)
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", a, b), a, b), LLVM[I32])

    return (signature(I32, a, b), generate) if a is I32 and b is I32 else None


@intrinsic
def any_byte(_typing: Any, words: Any, byte: Any) -> Any:
    """Whether one of 64 bytes is this one."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wanted = broadcast(builder, [context.cast(builder, args[1], sig.args[1], types.uint8)], 64)
        equal = builder.icmp_unsigned("==", builder.bitcast(args[0], _BYTES_OF), wanted)
        bits = builder.bitcast(equal, ir.IntType(64))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return (
        (signature(types.boolean, words, byte), generate) if words is I32 and isinstance(byte, types.Integer) else None
    )


@intrinsic
def halved_signed(_typing: Any, words: Any) -> Any:
    """64 bytes as 32 signed numbers, halved, downwards."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.ashr(builder.bitcast(args[0], _WORDS_OF), ir.Constant(_WORDS_OF, [1] * 2 * LANES))

    return (signature(U16, words), generate) if words is I32 else None


def _zero() -> ir.Constant:
    return ir.Constant(ir.IntType(64), 0)
