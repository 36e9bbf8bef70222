"""Vectors in memory: 16 or 32 numbers at a time between arrays and :mod:`uqff.simd.vectors`.

==============================  ==========================================================================
``load_u8`` ``load_i8``         ``(bytes, at) -> I32``: 16 bytes, widened
``load_u16`` ``load_i32``       ``(bytes, at) -> I32``: 16 little-endian words, from any address
``load_u24``                    ``(bytes, at) -> I32``: 16 little-endian words of three bytes
``load_bytes``                  ``(bytes, at) -> U8``: 32 bytes
``load_nibbles``                ``(bytes, at) -> U8``: 16 bytes; their low nibbles, then their high nibbles
``load_codes_3`` ...            ``(bytes, at) -> (I32, I32)``: 32 codes of 3, 4 or 6 bits, the first in the lowest bits;
                                what is above a code means nothing
``load_f32`` ``load_f64``       ``(float32s, at) -> F32``, ``(float64s, at) -> F64``
``load_u32`` ``load_one_u16``   ``(bytes, at) -> uint32`` or ``uint16``: one little-endian word, from any address
``store_f32``                   ``(array, at, F32)``: to a float32 array, or to bytes at any address
``store_f64`` ``store_i32``     ``(array, at, F64)``, ``(array, at, I32)``
``store_u8`` ``store_u16``      ``(bytes, at, I32)``: the low quarters or halves, to any address
``store_high_u16``              ``(bytes, at, I32, I32)``: the high halves of both, to any address
``store_words``                 ``(bytes, at, U16)``, to any address
``transpose``                   ``(float32s, start, float32s, at)``: rows of 16 times 16 numbers become columns
``prefetch_read`` ...           ``(bytes, at)``: ask for a cache line, which need not exist, to read or to write it
==============================  ==========================================================================

Nothing checks bounds: the callers do.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from uqff.simd.vectors import F32, F64, I32, LANES, LLVM, U8, U16, SimdType, intrinsic, shuffled, signature

__all__ = [
    "load_bytes",
    "load_codes_3",
    "load_codes_4",
    "load_codes_6",
    "load_f32",
    "load_f64",
    "load_i8",
    "load_i32",
    "load_nibbles",
    "load_one_u16",
    "load_u8",
    "load_u16",
    "load_u24",
    "load_u32",
    "prefetch_read",
    "prefetch_write",
    "store_f32",
    "store_f64",
    "store_high_u16",
    "store_i32",
    "store_u8",
    "store_u16",
    "store_words",
    "transpose",
]

_I8, _I16, _INT32, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def _of(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _address(context: Any, builder: Any, array_type: Any, array: Any, at: Any, pointee: ir.Type) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), pointee.as_pointer())


def _is_array(numba_type: Any) -> bool:
    return isinstance(numba_type, types.Array) and numba_type.layout == "C"


def _loader(element: ir.Type, result: SimdType, widen: str | None) -> Any:
    def load(_typing: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = _address(context, builder, sig.args[0], args[0], args[1], _of(element))
            vector = builder.load(pointer, align=sig.args[0].dtype.bitwidth // 8)
            return getattr(builder, widen)(vector, LLVM[result]) if widen else vector

        return (signature(result, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(load)


load_u8 = _loader(_I8, I32, "zext")
load_i8 = _loader(_I8, I32, "sext")
load_u16 = _loader(_I16, I32, "zext")
load_i32 = _loader(_INT32, I32, None)
load_f32 = _loader(_FLOAT, F32, None)
load_f64 = _loader(ir.DoubleType(), F64, None)


@intrinsic
def load_bytes(_typing: Any, array: Any, at: Any) -> Any:
    """32 bytes as they are."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, sig.args[0], args[0], args[1], LLVM[U8]), align=1)

    return (signature(U8, array, types.intp), generate) if _is_array(array) else None


@intrinsic
def load_nibbles(_typing: Any, array: Any, at: Any) -> Any:
    """16 bytes: their low nibbles, then their high nibbles."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        packed = builder.load(_address(context, builder, sig.args[0], args[0], args[1], _of(_I8)), align=1)
        # Both halves of a register from memory, which takes none of the few ports that move bytes between them.
        words = ir.VectorType(_INT32, LANES // 2)
        twice = builder.bitcast(shuffled(builder, packed, packed, [*range(LANES)] * 2), words)
        shifts = ir.Constant(words, [0] * (LANES // 4) + [4] * (LANES // 4))
        return builder.bitcast(
            builder.and_(builder.lshr(twice, shifts), ir.Constant(words, [0x0F0F0F0F] * 8)), LLVM[U8]
        )

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
                lanes = builder.bitcast(shuffled(builder, stream, stream, indices), LLVM[I32])
                vectors.append(builder.lshr(lanes, ir.Constant(LLVM[I32], [bits * i % 8 for i in range(LANES)])))
            return context.make_tuple(builder, sig.return_type, vectors)

        both = types.UniTuple(I32, 2)  # type: ignore[no-untyped-call]
        return (signature(both, array, types.intp), generate) if _is_array(array) else None

    return intrinsic(load)


load_codes_3, load_codes_4, load_codes_6 = (_stream_loader(bits) for bits in (3, 4, 6))


@intrinsic
def load_u24(_typing: Any, array: Any, at: Any) -> Any:
    """48 bytes: 16 little-endian words of three each; no byte beyond them is read."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        packed, quarters = ir.VectorType(_I8, LANES), []
        zeros = ir.Constant(packed, [0] * LANES)
        for start, skipped in ((0, 0), (12, 0), (24, 0), (32, 4)):
            place = builder.add(args[1], ir.Constant(args[1].type, start))
            given = builder.load(_address(context, builder, sig.args[0], args[0], place, packed), align=1)
            lanes = [LANES if i % 4 == 3 else skipped + i // 4 * 3 + i % 4 for i in range(LANES)]
            quarters.append(shuffled(builder, given, zeros, lanes))
        a, b, c, d = quarters
        low, high = (shuffled(builder, *pair, list(range(2 * LANES))) for pair in ((a, b), (c, d)))
        return builder.bitcast(shuffled(builder, low, high, list(range(4 * LANES))), LLVM[I32])

    return (signature(I32, array, types.intp), generate) if _is_array(array) else None


def _storer(element: ir.Type, source: SimdType, narrow: str | None) -> Any:
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
                        rows[place] = shuffled(builder, *pair, lanes)
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
        high = shuffled(builder, a, b, list(range(1, 4 * LANES, 2)))
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


load_u32, load_one_u16 = _word_loader(_INT32, types.uint32), _word_loader(_I16, types.uint16)
