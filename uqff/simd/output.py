"""Narrow floats by their bits, and the last step of every dequantise kernel: 16 numbers into the caller's buffer.

Every kernel computes in float32 and ends in :func:`put_pair`, which writes float32, bfloat16 or float16.  So there is
one compiled kernel a type, whatever the dtype of the result.

::

    float32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm     bias 127
    bfloat16  s eeeeeeee mmmmmmm                     bias 127
    float16   s eeeee mmmmmmmmmm                     bias 15
    e4m3      s eeee mmm                             bias 7; no infinity, 0x7F and 0xFF are NaN

What reads a number here drops the payload of a NaN, if it does not say otherwise.  A CPU's own NaNs have none either,
so :func:`put_pair` can round without looking for NaNs.

A CPU's own rounding to bfloat16 takes subnormal numbers, those below 2**-126, for zeros.  Where a kernel can tell from
its scales that there will be none, it says so with :func:`without_subnormals`.  All such proofs rest on one fact: the
multiples of 2**-k, k up to 149, are closed under sums, products with integers, and rounding to float32, which leaves a
multiple alone or makes it one of a larger power of two.  So if every number that comes in is zero or at least
2**(23 - k), hence a multiple of 2**-k, then what comes out is zero or at least 2**-k, also where most of it cancels.
All float16 numbers are multiples of 2**-24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import types

from uqff.codes import DType
from uqff.simd.bits import MAGNITUDE, bits_of, f16_value, float_of
from uqff.simd.compiling import inline, overload, subroutine
from uqff.simd.cpu import (
    HAS_BF16,
    HAS_HALF,
    HAS_PERMUTE,
    bfloat_bits,
    half_bits,
    half_splat,
    half_value,
    half_values,
    hi_f16_to_f32,
    lo_f16_to_f32,
    permute,
)
from uqff.simd.load_store import (
    load_i32,
    load_one_u16,
    load_u16,
    load_u32,
    prefetch_read,
    prefetch_write,
    store_f32,
    store_high_u16,
    store_u16,
    store_words,
)
from uqff.simd.masks import andnot, any_lane
from uqff.simd.threads import run_ranges
from uqff.simd.vectors import (
    LANES,
    as_f32,
    as_i32,
    hi_u16_to_i32,
    i32_to_f32,
    lo_u16_to_i32,
    ramp,
    signed_words,
    splat,
    where_less,
)

__all__ = [
    "BF16",
    "F16",
    "F32",
    "FORMS",
    "NORMAL_BF16",
    "Bytes",
    "Kernel",
    "bf16",
    "e4m3_pair",
    "f16",
    "f16_lanes",
    "f16_pair",
    "f16_splat",
    "f32",
    "f32_lanes",
    "looked_up",
    "over",
    "plain",
    "plain_lanes",
    "put",
    "put_pair",
    "put_pair_here",
    "reach",
    "read_ahead",
    "unfold",
    "without_subnormals",
    "write_ahead",
    "zero_or_from",
]

Bytes: TypeAlias = npt.NDArray[np.uint8]

F32, BF16, F16 = 0, 1, 2
"""What :func:`put_pair` writes, and :func:`plain` reads."""

FORMS: Mapping[DType, int] = {DType.F32: F32, DType.BF16: BF16, DType.F16: F16}

NORMAL_BF16 = 3 if HAS_BF16 else BF16
"""bfloat16 again, of numbers that are zero or at least 2**-126."""

AHEAD = 2048
"""Bytes from what is read or written to what the caches are asked for; a CPU itself looks ahead less, within a page."""


Kernel: TypeAlias = Callable[[Bytes, Bytes, int, int, int], None]
"""``(data, out, form, lo, hi)``: items ``[lo, hi)`` of ``data`` into ``out``."""


def over(items: int, weights: int, work: Callable[[int, int], None]) -> None:
    """Run ``work(lo, hi)`` over ``items`` of ``weights`` numbers each, on as many threads as it is worth.

    A range has at least 64 Ki numbers, which take some 10 µs, and at least 32 items.
    """
    run_ranges(work, items, grain=max(-(-65536 // weights), 32))


@inline
def without_subnormals(form: int, certain: bool) -> Any:
    """The form to write if it is certain that no number is subnormal, which need not be looked at otherwise."""
    return NORMAL_BF16 if form == BF16 and certain else form


@inline
def zero_or_from(least: Any, x: Any) -> Any:
    """Whether a float32 is zero or at least of the magnitude of another, or NaN."""
    return (bits_of(x) & MAGNITUDE) - np.uint64(1) >= bits_of(least) - np.uint64(1)


@inline
def read_ahead(data: Bytes, at: int) -> None:
    """Have what lies :data:`AHEAD` of a byte brought near. A call for every 64 bytes suffices, more do no harm."""
    prefetch_read(data, at + AHEAD)


@inline
def f32(data: Bytes, at: int) -> Any:
    """The little-endian float32 at ``data[at]``; NaN becomes 0x7FC00000."""
    bits = np.int64(load_u32(data, at))
    return float_of(np.uint32(0x7FC00000 if bits & 0x7FFFFFFF > 0x7F800000 else bits))


@inline
def bf16(data: Bytes, at: int) -> Any:
    """The float32 of the little-endian bfloat16 at ``data[at]``; NaN becomes 0x7FC00000."""
    bits = np.int64(load_one_u16(data, at)) << 16
    return float_of(np.uint32(0x7FC00000 if bits & 0x7FFFFFFF > 0x7F800000 else bits))


@inline
def _f16_at_by_cpu(data: Bytes, at: int) -> Any:
    bits = load_one_u16(data, at)
    return half_value(np.uint16(0x7E00) if bits & 0x7FFF > 0x7C00 else bits)


@inline
def _f16_at_by_bits(data: Bytes, at: int) -> Any:
    return f16_value(np.int64(load_one_u16(data, at)))


f16 = _f16_at_by_cpu if HAS_HALF else _f16_at_by_bits
"""``f16(data, at)``: the float32 of the little-endian float16 at ``data[at]``; NaN becomes 0x7FC00000."""


@subroutine
def plain(data: Bytes, i: int, form: int) -> Any:
    """Number ``i`` of an array of float32, bfloat16 or float16 numbers."""
    if form == F32:
        return f32(data, 4 * i)
    return bf16(data, 2 * i) if form == BF16 else f16(data, 2 * i)


@inline
def f32_lanes(bits: Any) -> Any:
    """:func:`f32` of 16 bit patterns."""
    return as_f32(where_less(splat(0x7F800000), bits & 0x7FFFFFFF, splat(0x7FC00000), bits))


@inline
def _f16_by_cpu(bits: Any) -> Any:
    return f32_lanes(as_i32(half_values(bits)))


@inline
def _f16_by_bits(bits: Any) -> Any:
    magnitude = bits & 0x7FFF
    normal = (magnitude << 13) + (112 << 23)
    subnormal = as_i32(i32_to_f32(magnitude) * np.float32(2.0**-24))
    finite = where_less(magnitude, 0x0400, subnormal, normal)
    special = where_less(magnitude, 0x7C01, splat(0x7F800000), splat(0x7FC00000))
    return as_f32(where_less(magnitude, 0x7C00, finite, special) | (bits & 0x8000) << 16)


f16_lanes = _f16_by_cpu if HAS_HALF else _f16_by_bits
""":func:`f16` of 16 bit patterns."""


@inline
def _f16_pair_by_cpu(bits: Any) -> Any:
    return lo_f16_to_f32(bits), hi_f16_to_f32(bits)


@inline
def _f16_pair_by_bits(bits: Any) -> Any:
    return _f16_by_bits(lo_u16_to_i32(bits)), _f16_by_bits(hi_u16_to_i32(bits))


f16_pair = _f16_pair_by_cpu if HAS_HALF else _f16_pair_by_bits
"""The float32s of 32 float16 bit patterns, as two vectors; a NaN may keep its payload, of which none that e4m3 makes is
carried away."""


@inline
def plain_lanes(data: Bytes, i: int, kind: int) -> Any:
    """:func:`plain` of 16 numbers."""
    if kind == F32:
        return f32_lanes(load_i32(data, 4 * i))
    bits = load_u16(data, 2 * i)
    return f32_lanes(bits << 16) if kind == BF16 else f16_lanes(bits)


@subroutine
def unfold(strip: Any, data: Bytes, kind: int, first: int, count: int, least: Any) -> Any:
    """Numbers ``[first, first + count)`` of such an array, as float32; whether each is 0 or at least ``least``."""
    certain = True
    if count < LANES:
        for i in range(count):
            x = plain(data, first + i, kind)
            strip[i] = x
            certain &= zero_or_from(least, x)
        return certain
    for i in range(0, count, LANES):
        at = min(i, count - LANES)
        x = plain_lanes(data, first + at, kind)
        store_f32(strip, at, x)
        magnitude = as_f32(as_i32(x) & 0x7FFFFFFF)
        certain &= not any_lane(andnot(magnitude < least, magnitude == np.float32(0)))
    return certain


@inline
def e4m3_pair(codes: Any) -> Any:
    """The float32s of 32 e4m3 codes, as two vectors.

    float16 has the same fields, wider ones, and a bias that is larger by 8. NaN, all ones, needs its exponent.
    """
    bits = signed_words(codes) << 7
    bits = bits & 0xBF80 | (bits & 0x3F80) + 0x0080 & 0x4000
    x, y = f16_pair(bits)
    return x * np.float32(2.0**8), y * np.float32(2.0**8)


@inline
def _f16_splat_by_cpu(data: Bytes, at: int) -> Any:
    return half_splat(load_one_u16(data, at))


@inline
def _f16_splat_by_bits(data: Bytes, at: int) -> Any:
    return splat(f16(data, at))


f16_splat = _f16_splat_by_cpu if HAS_BF16 else _f16_splat_by_bits
"""16 copies of :func:`f16`, whose NaN may keep its payload: for kernels without subnormals, which leave the rounding to
such a CPU."""


@inline
def _round_to_bf16(x: Any) -> Any:
    """Bits whose high halves are the nearest bfloat16s, ties to even; the low halves mean nothing.

    A carry out of the mantissa goes into the exponent, as it should. A NaN without payload stays what it is; one with a
    payload might be carried away, which is why there are none.
    """
    bits = as_i32(x)
    return bits + 0x7FFF + ((bits >> 16) & 1)


@inline
def _to_f16_by_bits(x: Any) -> Any:
    """The nearest float16s, ties to even, as bits; infinity from 65520 on, NaN stays NaN.

    Below 2**-14 the target's unit is 2**-24, which is the unit of float32 numbers from 0.5 on: adding 0.5 rounds.
    """
    bits = as_i32(x)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - (112 << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13
    subnormal = as_i32(as_f32(magnitude) + np.float32(0.5)) - 0x3F000000
    finite = where_less(magnitude, 113 << 23, subnormal, normal)
    number_or_infinity = where_less(magnitude, 0x477FF000, finite, splat(0x7C00))
    half = where_less(splat(0x7F800000), magnitude, splat(0x7E00), number_or_infinity)
    return half | (bits >> 16) & 0x8000


_to_f16 = half_bits if HAS_HALF else _to_f16_by_bits


def looked_up(function: Callable[..., Any]) -> Any:
    """Compile a function of codes below 16 (and of scalars) that goes lane by lane.

    Where the CPU can, it is computed once for each code there may be, which LLVM takes out of loops, and looked up.
    """
    compiled: Any = inline(function)
    if not HAS_PERMUTE:
        return compiled

    @inline
    def looked_up(codes: Any, *scalars: Any) -> Any:
        return permute(compiled(ramp(1, LANES), *scalars), codes)

    return looked_up


@inline
def _store_by_cpu(out: Bytes, at: int, x: Any, y: Any) -> None:
    store_words(out, at, bfloat_bits(x, y))


@inline
def _store_by_bits(out: Bytes, at: int, x: Any, y: Any) -> None:
    store_high_u16(out, at, _round_to_bf16(x), _round_to_bf16(y))


_store_normal = _store_by_cpu if HAS_BF16 else _store_by_bits


@inline
def put(out: Bytes, at: int, form: int, x: Any) -> None:
    """Write 16 numbers to a result.

    Args:
        out: the bytes of the result.
        at: element of the result to begin with.
        form: :data:`F32`, :data:`BF16` or :data:`F16`. It is the same for a whole call, so the branch costs nothing.
        x: float32 vector; with :data:`BF16`, any NaN in it without payload.
    """
    if form == F32:
        store_f32(out, 4 * at, x)
    elif form == F16:
        store_u16(out, 2 * at, _to_f16(x))
    else:
        store_u16(out, 2 * at, _round_to_bf16(x) >> 16)


def put_pair(out: Bytes, at: int, form: int, x: Any, y: Any) -> None:
    """Write 32 numbers: :func:`put` of two vectors, which costs less than two calls.

    Kernels that multiply have other places to put what a decoder decodes: see :mod:`uqff.simd.decoding`.

    Args:
        form: :data:`NORMAL_BF16`, too.
    """
    raise TypeError("for kernels; Python cannot call it")


@overload(put_pair)
def _put_pair(out: Any, at: Any, form: Any, x: Any, y: Any) -> Any:
    def write(out: Any, at: Any, form: Any, x: Any, y: Any) -> Any:
        write_ahead(out, at, form, reach(form))
        put_pair_here(out, at, form, x, y)

    return write if isinstance(out, types.Array) and out.dtype == types.uint8 else None


@inline
def reach(form: int) -> Any:
    """The elements of a result in :data:`AHEAD` bytes."""
    return AHEAD // 4 if form == F32 else AHEAD // 2


@inline
def write_ahead(out: Bytes, at: int, form: int, elements: int) -> None:
    """Have the place of 32 numbers so many elements on brought near, to be written."""
    if form == F32:
        prefetch_write(out, 4 * (at + elements))
        prefetch_write(out, 4 * (at + elements + LANES))
    else:
        prefetch_write(out, 2 * (at + elements))


@inline
def put_pair_here(out: Bytes, at: int, form: int, x: Any, y: Any) -> None:
    """:func:`put_pair` for a caller that knows better where it will write next, and has called :func:`write_ahead`."""
    if form == F32:
        store_f32(out, 4 * at, x)
        store_f32(out, 4 * (at + LANES), y)
    elif form == F16:
        store_u16(out, 2 * at, _to_f16(x))
        store_u16(out, 2 * (at + LANES), _to_f16(y))
    elif form == NORMAL_BF16:
        _store_normal(out, 2 * at, x, y)
    else:
        _store_by_bits(out, 2 * at, x, y)
