"""Sixteen or 32 numbers at a time: vectors for numba kernels, so that they do not depend on LLVM vectorising a loop.

A block's inner loop is 16 or 32 long and known when compiling; LLVM unrolls such loops before its vectoriser sees them.
So the kernels say what they mean: :data:`I32`, :data:`F32` and :data:`F64` are numba types of 16 lanes, :data:`U8` and
:data:`U16` of 32, which LLVM maps to whatever the CPU has (F32: one AVX-512 register, two AVX2, four SSE or NEON).  All
operations are lane by lane; scalars on the right are broadcast to all lanes.  Floats are never contracted: no flag here
allows LLVM to.  Loads and stores are in :mod:`uqff.simd.load_store`, comparisons in :mod:`uqff.simd.masks`, what not
every CPU has in :mod:`uqff.simd.cpu`.

==============================  ==========================================================================
``spread_bits``                 ``(word, value) -> U8``: ``value`` where the bit is set, lowest bit first, else 0
``lo_u8_to_f32`` ``hi_...``     ``(U8) -> F32``: the first or last 16 bytes as numbers
``lo_i8_to_f32`` ``hi_...``     the same of signed bytes
``splat``                       ``(float32) -> F32``, ``(float64) -> F64``, ``(integer) -> I32``
``halves``                      ``(a, b) -> I32``: lanes 0-7 hold a, 8-15 hold b
``quarters``                    ``(a, b, c, d) -> I32``: four lanes each
``ramp``                        ``(step, period) -> I32``: lane i holds ``step * (i mod period)``, period a power of 2
``lane``                        ``(F32, i) -> float32``
``i32_to_f32``                  ``(I32) -> F32``: the value as a float, exact below 2**24
``truncated``                   ``(F32) -> I32``: towards zero; only for -2**31 <= value < 2**31
``as_f32`` ``as_i32``           the same bits as the other type
``wide`` ``narrow``             ``(F32) -> F64``, ``(F64) -> F32``: rounded to nearest, ties to even
``signed_words``                ``(U8) -> U16``: signed bytes, widened
``lo_u16_to_i32`` ``hi_...``    ``(U16) -> I32``: the first or last 16, widened
``where_less``                  ``(a, b, x, y)``: x where a < b (signed), else y
``+ - & | << >>``               of I32, U8, U16, I16, I32_8 and I32_8_ROWS, modulo their size; ``>>`` shifts zeros in
``+ - * /``                     of F32 and F64
==============================  ==========================================================================
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
    "F32",
    "F32_8",
    "F64",
    "I16",
    "I16_ROWS",
    "I32",
    "I32_8",
    "I32_8_ROWS",
    "LANES",
    "LLVM",
    "MASK",
    "ROWS",
    "U8",
    "U8_ROWS",
    "U16",
    "SimdType",
    "as_f32",
    "as_i32",
    "broadcast",
    "halves",
    "hi_i8_to_f32",
    "hi_u8_to_f32",
    "hi_u16_to_i32",
    "i32_to_f32",
    "intrinsic",
    "lane",
    "lo_i8_to_f32",
    "lo_u8_to_f32",
    "lo_u16_to_i32",
    "multiply_add",
    "narrow",
    "quarters",
    "ramp",
    "shuffled",
    "signature",
    "signed_words",
    "splat",
    "spread_bits",
    "total",
    "truncated",
    "where_less",
    "wide",
]

LANES = 16


def intrinsic(function: Callable[..., Any]) -> Any:
    """What kernels call by the function's name, without its first argument: code that the function generates."""
    return extending.intrinsic(function)


def signature(result: Any, *arguments: Any) -> Any:
    """Numba's signature."""
    return templates.signature(result, *arguments)  # type: ignore[no-untyped-call]


class SimdType(types.Type):
    """The numba type of so many lanes."""

    def __init__(self, element: Any, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"{element} x {lanes}")


U8 = SimdType(types.uint8, 2 * LANES)
U16 = SimdType(types.uint16, 2 * LANES)
I32 = SimdType(types.int32, LANES)
F32 = SimdType(types.float32, LANES)
F64 = SimdType(types.float64, LANES)
MASK = SimdType(types.boolean, LANES)  # see uqff.simd.masks
I16 = SimdType(types.int16, LANES)  # this and the next two: see uqff.simd.dots
I32_8 = SimdType(types.int32, LANES // 2)
F32_8 = SimdType(types.float32, LANES // 2)
ROWS = 4  # and these of so many rows beside each other
U8_ROWS = SimdType(types.uint8, ROWS * 2 * LANES)
I16_ROWS = SimdType(types.int16, ROWS * LANES)
I32_8_ROWS = SimdType(types.int32, ROWS * LANES // 2)

_I1, _I8, _I16, _INT32, _FLOAT = (ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType())


def _of(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


LLVM = {I32: _of(_INT32), F32: _of(_FLOAT), F64: _of(ir.DoubleType()), MASK: _of(_I1)}
LLVM |= {U8: ir.VectorType(_I8, 2 * LANES), U16: ir.VectorType(_I16, 2 * LANES)}
LLVM |= {I16: _of(_I16), I32_8: ir.VectorType(_INT32, LANES // 2), F32_8: ir.VectorType(_FLOAT, LANES // 2)}
LLVM |= {U8_ROWS: ir.VectorType(_I8, U8_ROWS.lanes), I16_ROWS: ir.VectorType(_I16, I16_ROWS.lanes)}
LLVM |= {I32_8_ROWS: ir.VectorType(_INT32, I32_8_ROWS.lanes)}


@register_model(SimdType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: SimdType) -> None:
        super().__init__(manager, vector, LLVM[vector])  # type: ignore[no-untyped-call]


def shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


def broadcast(builder: Any, scalars: list[Any], lanes: int = LANES) -> Any:
    """A vector of lanes / n copies of each of n scalars."""
    n = len(scalars)
    vector = ir.Constant(ir.VectorType(scalars[0].type, n), ir.Undefined)
    for i, scalar in enumerate(scalars):
        vector = builder.insert_element(vector, scalar, ir.Constant(_INT32, i))
    return shuffled(builder, vector, vector, [i * n // lanes for i in range(lanes)])


@intrinsic
def spread_bits(_typing: Any, bits: Any, value: Any) -> Any:
    """``value`` in the lanes whose bit of a 32-bit word is set, lowest bit first; 0 in the others."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = context.cast(builder, args[0], sig.args[0], types.uint32)
        chosen = builder.bitcast(word, ir.VectorType(_I1, 2 * LANES))
        lanes = broadcast(builder, [context.cast(builder, args[1], sig.args[1], types.uint8)], 2 * LANES)
        return builder.select(chosen, lanes, ir.Constant(LLVM[U8], [0] * 2 * LANES))

    return signature(U8, bits, value), generate


def _half(start: int, widen: str) -> Any:
    def half(_typing: Any, vector: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            lanes = shuffled(builder, args[0], args[0], list(range(start, start + LANES)))
            return builder.sitofp(getattr(builder, widen)(lanes, LLVM[I32]), LLVM[F32])

        return (signature(F32, U8), generate) if vector is U8 else None

    return intrinsic(half)


lo_u8_to_f32, hi_u8_to_f32 = _half(0, "zext"), _half(LANES, "zext")
lo_i8_to_f32, hi_i8_to_f32 = _half(0, "sext"), _half(LANES, "sext")


def _from_scalars(_typing: Any, *scalars: Any) -> Any:
    vector = {types.float32: F32, types.float64: F64}.get(scalars[0], I32)
    element = vector.element

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return broadcast(builder, [context.cast(builder, a, t, element) for a, t in zip(args, sig.args, strict=True)])

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
        step, period = (broadcast(builder, [context.cast(builder, a, types.intp, types.int32)]) for a in args)
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


@intrinsic
def total(_typing: Any, vector: Any) -> Any:
    """The sum of all lanes: halves are added until one is left."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        sums, n = args[0], LANES
        while n > 1:
            n //= 2
            sums = builder.fadd(
                shuffled(builder, sums, sums, list(range(n))), shuffled(builder, sums, sums, list(range(n, 2 * n)))
            )
        return builder.extract_element(sums, ir.Constant(_INT32, 0))

    return (signature(types.float32, F32), generate) if vector is F32 else None


@intrinsic
def multiply_add(_typing: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once where the CPU has an instruction for it, else twice: for sums in any order only."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        function = ir.FunctionType(LLVM[F32], [LLVM[F32]] * 3)
        return builder.call(builder.module.declare_intrinsic(f"llvm.fmuladd.v{LANES}f32", (), function), args)

    return (signature(F32, F32, F32, F32), generate) if a is b is c is F32 else None


def _conversion(source: SimdType, result: SimdType, instruction: str) -> Any:
    def convert(_typing: Any, vector: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            return getattr(builder, instruction)(args[0], LLVM[result])

        return (signature(result, source), generate) if vector is source else None

    return intrinsic(convert)


i32_to_f32 = _conversion(I32, F32, "sitofp")
truncated = _conversion(F32, I32, "fptosi")
as_f32 = _conversion(I32, F32, "bitcast")
as_i32 = _conversion(F32, I32, "bitcast")
wide = _conversion(F32, F64, "fpext")
narrow = _conversion(F64, F32, "fptrunc")
signed_words = _conversion(U8, U16, "sext")


def _words(start: int) -> Any:
    def words(_typing: Any, vector: Any) -> Any:
        def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            lanes = list(range(start, start + LANES))
            return builder.zext(shuffled(builder, args[0], args[0], lanes), LLVM[I32])

        return (signature(I32, U16), generate) if vector is U16 else None

    return intrinsic(words)


lo_u16_to_i32, hi_u16_to_i32 = _words(0), _words(LANES)


@intrinsic
def where_less(_typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """``x`` in the lanes where ``a < b`` as signed integers, ``y`` in the others; ``b`` may be a scalar."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        limit = args[1] if sig.args[1] is I32 else broadcast(builder, [context.cast(builder, args[1], b, types.int32)])
        return builder.select(builder.icmp_signed("<", args[0], limit), args[2], args[3])

    return (signature(x, a, b, x, x), generate) if a is I32 and x is y else None


def _operator(function: Any, vector: SimdType, scalar: Any, instruction: str) -> None:
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
        return getattr(builder, instruction)(args[0], broadcast(builder, [value], vector.lanes))

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
    _operator(_function, I32_8, types.Integer, _instruction)
    _operator(_function, I32_8_ROWS, types.Integer, _instruction)
    _operator(_function, I16, types.Integer, _instruction)
_FUNCTIONS = (operator.add, operator.sub, operator.mul, operator.truediv)
for _function, _instruction in zip(_FUNCTIONS, ("fadd", "fsub", "fmul", "fdiv"), strict=True):
    # Of one width only: a float64 scalar to the right of float32 lanes would be rounded silently.
    _operator(_function, F32, types.float32, _instruction)
    _operator(_function, F64, types.float64, _instruction)
    _operator(_function, F32_8, types.float32, _instruction)
