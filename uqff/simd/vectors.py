"""Sixteen or 32 numbers at a time: vectors for numba kernels, so that they do not depend on LLVM vectorising a loop.

A block's inner loop is 16 or 32 long and known when compiling; LLVM unrolls such loops before its vectoriser sees them.
So the kernels say what they mean: :data:`I32`, :data:`F32` and :data:`F64` are numba types of 16 lanes, :data:`U8` and
:data:`U16` of 32, which LLVM maps to whatever the CPU has (F32: one AVX-512 register, two AVX2, four SSE or NEON).  All
operations are lane by lane; scalars on the right are spread over all lanes.  Floats are never contracted: no flag here
allows LLVM to.  What not every CPU has is in :mod:`uqff.simd.cpu`.

==============================  ==========================================================================
``load_u8`` ``load_i8``         ``(bytes, at) -> I32``: 16 bytes, widened
``load_u16`` ``load_i32``       ``(bytes, at) -> I32``: 16 little-endian words, from any address
``load_bytes``                  ``(bytes, at) -> U8``: 32 bytes
``load_nibbles``                ``(bytes, at) -> U8``: 16 bytes; their low nibbles, then their high nibbles
``load_codes_3`` ...            ``(bytes, at) -> (I32, I32)``: 32 codes of 3, 4 or 6 bits, the first in the lowest bits;
                                what is above a code means nothing
``spread_bits``                 ``(word, value) -> U8``: ``value`` where the bit is set, lowest bit first, else 0
``first`` ``second``            ``(U8) -> F32``: the first or last 16 bytes as numbers
``first_signed`` ...            the same of signed bytes
``load_f32``                    ``(float32s, at) -> F32``
``store_f32``                   ``(array, at, F32)``: to a float32 array, or to bytes at any address
``store_f64`` ``store_i32``     ``(array, at, F64)``, ``(array, at, I32)``
``store_u8`` ``store_u16``      ``(bytes, at, I32)``: the low quarters or halves, to any address
``store_high_u16``              ``(bytes, at, I32, I32)``: the high halves of both, to any address
``store_words``                 ``(bytes, at, U16)``, to any address
``prefetch_read`` ...           ``(bytes, at)``: ask for a cache line, which need not exist, to read or to write it
``word`` ``short``              ``(bytes, at) -> uint32`` or ``uint16``: one little-endian word, from any address
``splat``                       ``(float32) -> F32``, ``(integer) -> I32``
``halves``                      ``(a, b) -> I32``: lanes 0-7 hold a, 8-15 hold b
``quarters``                    ``(a, b, c, d) -> I32``: four lanes each
``ramp``                        ``(step, period) -> I32``: lane i holds ``step * (i mod period)``, period a power of 2
``lane``                        ``(F32, i) -> float32``
``transpose``                   ``(float32s, start, float32s, at)``: rows of 16 times 16 numbers become columns
``number``                      ``(I32) -> F32``: the value as a float, exact below 2**24
``truncated``                   ``(F32) -> I32``: towards zero; only for -2**31 <= value < 2**31
``as_f32`` ``as_i32``           the same bits as the other type
``wide``                        ``(F32) -> F64``
``signed_words``                ``(U8) -> U16``: signed bytes, widened
``first_words`` ...             ``(U16) -> I32``: the first or last 16, widened
``where_less``                  ``(a, b, x, y)``: x where a < b (signed), else y
``+ - & | << >>``               of I32, U8 and U16, modulo their size; ``>>`` shifts zeros in
``+ - * /``                     of F32 and F64
==============================  ==========================================================================

Nothing checks bounds: the callers do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core.imputils import lower_builtin
from numba.core.typing import templates
from numba.extending import models, register_model, type_callable

__all__ = [
    "LANES",
    "as_f32",
    "as_i32",
    "first",
    "first_signed",
    "first_words",
    "halves",
    "lane",
    "load_bytes",
    "load_codes_3",
    "load_codes_4",
    "load_codes_6",
    "load_f32",
    "load_i8",
    "load_i32",
    "load_nibbles",
    "load_u8",
    "load_u16",
    "number",
    "prefetch_read",
    "prefetch_write",
    "quarters",
    "ramp",
    "second",
    "second_signed",
    "second_words",
    "short",
    "signed_words",
    "splat",
    "spread",
    "spread_bits",
    "store_f32",
    "store_f64",
    "store_high_u16",
    "store_i32",
    "store_u8",
    "store_u16",
    "store_words",
    "transpose",
    "truncated",
    "where_less",
    "wide",
    "word",
]

LANES = 16


def intrinsic(function: Callable[..., Any]) -> Any:
    """What kernels call by the function's name, without its first argument: code that the function generates."""
    return extending.intrinsic(function)


def signature(result: Any, *arguments: Any) -> Any:
    """Numba's signature."""
    return templates.signature(result, *arguments)  # type: ignore[no-untyped-call]


class Vector(types.Type):
    """The numba type of so many lanes."""

    def __init__(self, element: Any, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"{element} x {lanes}")


U8 = Vector(types.uint8, 2 * LANES)
U16 = Vector(types.uint16, 2 * LANES)
I32 = Vector(types.int32, LANES)
F32 = Vector(types.float32, LANES)
F64 = Vector(types.float64, LANES)
MASK = Vector(types.boolean, LANES)  # see uqff.simd.masks

_I1, _I8, _I16, _INT32, _FLOAT = (ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType())


def _of(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


_LLVM = {I32: _of(_INT32), F32: _of(_FLOAT), F64: _of(ir.DoubleType()), MASK: _of(_I1)}
_LLVM |= {U8: ir.VectorType(_I8, 2 * LANES), U16: ir.VectorType(_I16, 2 * LANES)}


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, _LLVM[vector])  # type: ignore[no-untyped-call]


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


def spread(builder: Any, scalars: list[Any], lanes: int = LANES) -> Any:
    """A vector of lanes / n copies of each of n scalars."""
    n = len(scalars)
    vector = ir.Constant(ir.VectorType(scalars[0].type, n), ir.Undefined)
    for i, scalar in enumerate(scalars):
        vector = builder.insert_element(vector, scalar, ir.Constant(_INT32, i))
    return _shuffle(builder, vector, vector, [i * n // lanes for i in range(lanes)])


def _address(context: Any, builder: Any, array_type: Any, array: Any, at: Any, pointee: ir.Type) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), pointee.as_pointer())


def _is_array(numba_type: Any) -> bool:
    return isinstance(numba_type, types.Array) and numba_type.layout == "C"


def _loader(element: ir.Type, result: Vector, widen: str | None) -> Any:
    def load(_typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = _address(context, builder, sig.args[0], args[0], args[1], _of(element))
            vector = builder.load(pointer, align=sig.args[0].dtype.bitwidth // 8)
            return getattr(builder, widen)(vector, _LLVM[result]) if widen else vector

        return (signature(result, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(load)


load_u8 = _loader(_I8, I32, "zext")
load_i8 = _loader(_I8, I32, "sext")
load_u16 = _loader(_I16, I32, "zext")
load_i32 = _loader(_INT32, I32, None)
load_f32 = _loader(_FLOAT, F32, None)


@intrinsic
def load_bytes(_typing: Any, array: Any, at: Any) -> Any:
    """32 bytes as they are."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, sig.args[0], args[0], args[1], _LLVM[U8]), align=1)

    return (signature(U8, array, types.intp), generate) if _is_array(array) else None


@intrinsic
def load_nibbles(_typing: Any, array: Any, at: Any) -> Any:
    """16 bytes: their low nibbles, then their high nibbles."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        packed = builder.load(_address(context, builder, sig.args[0], args[0], args[1], _of(_I8)), align=1)
        low = builder.and_(packed, ir.Constant(_of(_I8), [0x0F] * LANES))
        high = builder.lshr(packed, ir.Constant(_of(_I8), [4] * LANES))
        return _shuffle(builder, low, high, list(range(2 * LANES)))

    return (signature(U8, array, types.intp), generate) if _is_array(array) else None


def _stream_loader(bits: int) -> Any:
    """32 codes of a little-endian bit stream; no byte beyond them is read."""

    def load(_typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            # Each half in one load, of a power of two of bytes: the first and the last ones of the 32 codes.
            half = LANES * bits // 8
            size = 1 << (half - 1).bit_length()
            packed = ir.VectorType(_I8, size)
            vectors = []
            for skipped, behind in ((0, 0), (2 * half - size, size - half)):
                start = builder.add(args[1], ir.Constant(args[1].type, skipped))
                stream = builder.load(_address(context, builder, sig.args[0], args[0], start, packed), align=1)
                firsts = [behind + bits * i // 8 for i in range(LANES)]
                # Each lane gets the byte in which its code begins and the next.
                indices = [min(first + k % 2, size - 1) for first in firsts for k in range(4)]
                lanes = builder.bitcast(_shuffle(builder, stream, stream, indices), _LLVM[I32])
                vectors.append(builder.lshr(lanes, ir.Constant(_LLVM[I32], [bits * i % 8 for i in range(LANES)])))
            return context.make_tuple(builder, sig.return_type, vectors)

        both = types.UniTuple(I32, 2)  # type: ignore[no-untyped-call]
        return (signature(both, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(load)


load_codes_3, load_codes_4, load_codes_6 = (_stream_loader(bits) for bits in (3, 4, 6))


@intrinsic
def spread_bits(_typing: Any, bits: Any, value: Any) -> Any:
    """``value`` in the lanes whose bit of a 32-bit word is set, lowest bit first; 0 in the others."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = context.cast(builder, args[0], sig.args[0], types.uint32)
        chosen = builder.bitcast(word, ir.VectorType(_I1, 2 * LANES))
        lanes = spread(builder, [context.cast(builder, args[1], sig.args[1], types.uint8)], 2 * LANES)
        return builder.select(chosen, lanes, ir.Constant(_LLVM[U8], [0] * 2 * LANES))

    return signature(U8, bits, value), generate


def _half(start: int, widen: str) -> Any:
    def half(_typing: Any, vector: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            lanes = _shuffle(builder, args[0], args[0], list(range(start, start + LANES)))
            return builder.sitofp(getattr(builder, widen)(lanes, _LLVM[I32]), _LLVM[F32])

        return (signature(F32, U8), generate) if vector is U8 else None

    return intrinsic(half)


first, second = _half(0, "zext"), _half(LANES, "zext")
first_signed, second_signed = _half(0, "sext"), _half(LANES, "sext")


def _storer(element: ir.Type, source: Vector, narrow: str | None) -> Any:
    def store(_typing: Any, array: Any, at: Any, vector: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = getattr(builder, narrow)(args[2], _of(element)) if narrow else args[2]
            pointer = _address(context, builder, sig.args[0], args[0], args[1], value.type)
            builder.store(value, pointer, align=sig.args[0].dtype.bitwidth // 8)
            return context.get_dummy_value()

        fits = _is_array(array) and vector is source
        return (signature(types.none, array, types.intp, source), generate) if fits else None

    return intrinsic(store)


store_f32 = _storer(_FLOAT, F32, None)
store_i32 = _storer(_INT32, I32, None)
store_f64 = _storer(ir.DoubleType(), F64, None)
store_u8 = _storer(_I8, I32, "trunc")
store_u16 = _storer(_I16, I32, "trunc")
store_words = _storer(_I16, U16, None)


@intrinsic
def transpose(_typing: Any, source: Any, start: Any, target: Any, at: Any) -> Any:
    """``target[at + 16 * i + j] = source[start + 16 * j + i]`` for i and j below 16, of float32s.

    Rows that lie 8, 4, 2, 1 apart exchange halves, quarters, eighths, sixteenths: four steps of 16 shuffles.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def row(array: int, i: int) -> Any:
            at = builder.add(args[array + 1], ir.Constant(args[array + 1].type, LANES * i))
            return _address(context, builder, sig.args[array], args[array], at, _of(_FLOAT))

        rows = [builder.load(row(0, i), align=4) for i in range(LANES)]
        for distance in (8, 4, 2, 1):
            for i in range(LANES):
                if not i & distance:
                    pair = rows[i], rows[i + distance]
                    for place, parity in ((i, 0), (i + distance, distance)):
                        lanes = [lane & ~distance | parity | (LANES if lane & distance else 0) for lane in range(LANES)]
                        rows[place] = _shuffle(builder, *pair, lanes)
        for i in range(LANES):
            builder.store(rows[i], row(2, i), align=4)
        return context.get_dummy_value()

    fits = all(_is_array(array) and array.dtype == types.float32 for array in (source, target))
    return (signature(types.none, source, types.intp, target, types.intp), generate) if fits else None


@intrinsic
def store_high_u16(_typing: Any, array: Any, at: Any, a: Any, b: Any) -> Any:
    """The high halves of 32 lanes: one instruction picks them from two registers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        halves_of = ir.VectorType(_I16, 2 * LANES)
        a, b = (builder.bitcast(vector, halves_of) for vector in args[2:])
        high = _shuffle(builder, a, b, list(range(1, 4 * LANES, 2)))
        pointer = _address(context, builder, sig.args[0], args[0], args[1], halves_of)
        builder.store(high, pointer, align=1)
        return context.get_dummy_value()

    fits = _is_array(array) and a is I32 and b is I32
    return (signature(types.none, array, types.intp, a, b), generate) if fits else None


def _prefetcher(to_write: int) -> Any:
    """Asks for data, into all levels of caches."""

    def prefetch(_typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = _address(context, builder, sig.args[0], args[0], args[1], _I8)
            asking = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], asking)
            builder.call(function, [pointer, *(ir.Constant(_INT32, how) for how in (to_write, 3, 1))])
            return context.get_dummy_value()

        return (signature(types.none, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(prefetch)


prefetch_read, prefetch_write = _prefetcher(0), _prefetcher(1)


def _word_loader(element: ir.Type, result: Any) -> Any:
    def load(_typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load(_address(context, builder, sig.args[0], args[0], args[1], element), align=1)

        return (signature(result, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(load)


word, short = _word_loader(_INT32, types.uint32), _word_loader(_I16, types.uint16)


def _from_scalars(_typing: Any, *scalars: Any) -> Any:
    element = types.float32 if scalars[0] == types.float32 else types.int32
    vector = F32 if element == types.float32 else I32

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return spread(builder, [context.cast(builder, a, t, element) for a, t in zip(args, sig.args, strict=True)])

    if vector is I32 and not all(isinstance(s, types.Integer) for s in scalars):
        return None
    return signature(vector, *scalars), generate


@intrinsic
def splat(typing: Any, a: Any) -> Any:
    """16 copies of a scalar."""
    return _from_scalars(typing, a)


@intrinsic
def halves(typing: Any, a: Any, b: Any) -> Any:
    """8 copies each of two scalars."""
    return _from_scalars(typing, a, b)


@intrinsic
def quarters(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """4 copies each of four scalars."""
    return _from_scalars(typing, a, b, c, d)


@intrinsic
def ramp(_typing: Any, step: Any, period: Any) -> Any:
    """Lane i holds ``step * (i mod period)``; the period is a power of two."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        step, period = (spread(builder, [context.cast(builder, a, types.intp, types.int32)]) for a in args)
        index = ir.Constant(_of(_INT32), list(range(LANES)))
        within = builder.and_(index, builder.sub(period, ir.Constant(_of(_INT32), [1] * LANES)))
        return builder.mul(step, within)

    return signature(I32, types.intp, types.intp), generate


@intrinsic
def lane(_typing: Any, vector: Any, i: Any) -> Any:
    """One lane of a vector."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], builder.trunc(args[1], _INT32))

    return signature(vector.element, vector, types.intp), generate


def _conversion(source: Vector, result: Vector, instruction: str) -> Any:
    def convert(_typing: Any, vector: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            return getattr(builder, instruction)(args[0], _LLVM[result])

        return (signature(result, source), generate) if vector is source else None

    return intrinsic(convert)


number = _conversion(I32, F32, "sitofp")
truncated = _conversion(F32, I32, "fptosi")
as_f32 = _conversion(I32, F32, "bitcast")
as_i32 = _conversion(F32, I32, "bitcast")
wide = _conversion(F32, F64, "fpext")
signed_words = _conversion(U8, U16, "sext")


def _words(start: int) -> Any:
    def words(_typing: Any, vector: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            lanes = list(range(start, start + LANES))
            return builder.zext(_shuffle(builder, args[0], args[0], lanes), _LLVM[I32])

        return (signature(I32, U16), generate) if vector is U16 else None

    return intrinsic(words)


first_words, second_words = _words(0), _words(LANES)


@intrinsic
def where_less(_typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """``x`` in the lanes where ``a < b`` as signed integers, ``y`` in the others; ``b`` may be a scalar."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        limit = args[1] if sig.args[1] is I32 else spread(builder, [context.cast(builder, args[1], b, types.int32)])
        return builder.select(builder.icmp_signed("<", args[0], limit), args[2], args[3])

    return (signature(x, a, b, x, x), generate) if a is I32 and x is y else None


def _operator(function: Any, vector: Vector, scalar: Any, instruction: str) -> None:
    """Give an operator its meaning for two vectors, and for a vector and a scalar on its right."""

    def _type(_context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            fits = isinstance(b, scalar) if isinstance(scalar, type) else b == scalar
            return vector if a is vector and (b is vector or fits) else None

        return typer

    def _vectors(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(args[0], args[1])

    def _scalar(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = context.cast(builder, args[1], sig.args[1], vector.element)
        return getattr(builder, instruction)(args[0], spread(builder, [value], vector.lanes))

    type_callable(function)(_type)
    lower_builtin(function, vector, vector)(_vectors)  # type: ignore[no-untyped-call]
    lower_builtin(function, vector, scalar)(_scalar)  # type: ignore[no-untyped-call]


for _function, _instruction in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.lshift, "shl"),
    (operator.rshift, "lshr"),
):
    _operator(_function, I32, types.Integer, _instruction)
    _operator(_function, U8, types.Integer, _instruction)
    _operator(_function, U16, types.Integer, _instruction)
_FUNCTIONS = (operator.add, operator.sub, operator.mul, operator.truediv)
for _function, _instruction in zip(_FUNCTIONS, ("fadd", "fsub", "fmul", "fdiv"), strict=True):
    # Of one width only: a float64 scalar to the right of float32 lanes would be rounded silently.
    _operator(_function, F32, types.float32, _instruction)
    _operator(_function, F64, types.float64, _instruction)
