"""Comparisons of 16 numbers at a time, and what depends on them: the other half of :mod:`uqff.simd.vectors`.

A :data:`MASK` is one truth value a lane: an AVX-512 mask register, or lanes of ones and zeros where there is none.

==================  ====================================================================================
``< <= > == !=``    ``(F32, F32 or float32) -> MASK``, F64 likewise; NaN is unequal to everything, never less or greater
``& |``             of two masks
``andnot``          ``(MASK, MASK) -> MASK``: the first where the second is not
``where``           ``(MASK, a, b)``: a where the mask is set, else b; two of F32, F64 or I32
``any_lane``        ``(MASK) -> bool``: whether it is set anywhere
``movemask``        ``(MASK) -> int``: bit i is lane i
``nowhere``         ``() -> MASK``: set in no lane
==================  ====================================================================================
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin
from numba.extending import type_callable

from uqff.simd.vectors import F32, F64, I32, LANES, MASK, broadcast, intrinsic, signature

__all__ = ["andnot", "any_lane", "movemask", "nowhere", "where"]


def _comparison(function: Any, predicate: str, compare: str) -> None:
    def _type(_context: Any) -> Any:
        return lambda a, b: MASK if a in (F32, F64) and b in (a, a.element) else None

    def _vectors(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return getattr(builder, compare)(predicate, args[0], args[1])

    def _scalar(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return getattr(builder, compare)(predicate, args[0], broadcast(builder, [args[1]]))

    type_callable(function)(_type)
    for vector in (F32, F64):
        lower_builtin(function, vector, vector)(_vectors)  # type: ignore[no-untyped-call]
        lower_builtin(function, vector, vector.element)(_scalar)  # type: ignore[no-untyped-call]


for _function, _predicate in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.eq, "==")):
    _comparison(_function, _predicate, "fcmp_ordered")
_comparison(operator.ne, "!=", "fcmp_unordered")


def _connective(function: Any, instruction: str) -> None:
    def _type(_context: Any) -> Any:
        return lambda a, b: MASK if a is MASK and b is MASK else None

    def _masks(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(args[0], args[1])

    type_callable(function)(_type)
    lower_builtin(function, MASK, MASK)(_masks)  # type: ignore[no-untyped-call]


_connective(operator.and_, "and_")
_connective(operator.or_, "or_")


@intrinsic
def andnot(_typing: Any, mask: Any, excluded: Any) -> Any:
    """Set where ``mask`` is and ``excluded`` is not."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.and_(args[0], builder.not_(args[1]))

    return (signature(MASK, MASK, MASK), generate) if mask is MASK and excluded is MASK else None


@intrinsic
def where(_typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """``a`` in the lanes where the mask is set, ``b`` in the others."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.select(args[0], args[1], args[2])

    return (signature(a, mask, a, a), generate) if mask is MASK and a is b and a in (F32, F64, I32) else None


@intrinsic
def any_lane(_typing: Any, mask: Any) -> Any:
    """Whether a mask is set in any lane."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return (signature(types.boolean, mask), generate) if mask is MASK else None


@intrinsic
def movemask(_typing: Any, mask: Any) -> Any:
    """A mask as an integer: bit i is lane i."""

    def generate(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(64))

    return (signature(types.int64, mask), generate) if mask is MASK else None


@intrinsic
def nowhere(_typing: Any) -> Any:
    """A mask that is set in no lane."""

    def generate(context: Any, _builder: Any, _sig: Any, _args: Any) -> Any:
        return context.get_constant_null(MASK)

    return signature(MASK), generate
