"""The engine's scalar arithmetic for the quantise kernels: rounding, saturation, extremes of a block.

* ``round`` then saturate equals saturate then ``round``, as all bounds are integers: so a float is clamped before it
  becomes an integer, and the conversion never overflows.
* Half away from zero is ``trunc(v +- 0.49999997)``, 0.49999997 being the float below one half. With 0.5 it would be
  wrong for 0.49999997 itself, and for odd integers from 2^23 on; with its neighbour it is right for every float32.
  Its sign is taken from the bits of ``v``, one instruction where a comparison and a choice are two.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from uqff.simd.bits import bits_of, float_of
from uqff.simd.compiling import inline

BELOW_HALF = np.float32(0.49999997)
"""The float32 before 0.5."""
BELOW_HALF_BITS = BELOW_HALF.view(np.uint32)
SIGN = np.uint32(0x80000000)

ZERO = np.float32(0)
ONE = np.float32(1)
MAGNITUDE = np.int32(0x7FFFFFFF)


@inline
def half_away(v):
    """``v`` rounded half away from zero, as int32; only for -2^31 < v < 2^31."""
    return np.int32(v + float_of((bits_of(v) & SIGN) | BELOW_HALF_BITS))


@inline
def round(v):
    """:func:`half_away`, as a float."""
    return np.float32(half_away(v))


@inline
def unsigned_code(v, top):
    """``round(v)`` saturated to 0..top, as a float; NaN is 0."""
    v = v if v > ZERO else ZERO
    v = v if v < top else top
    return np.float32(np.int32(v + BELOW_HALF))


@inline
def signed_code(v, low, high):
    """``round(v)`` saturated to low..high, as a float; NaN is 0."""
    bounded = v if v > low else low
    bounded = bounded if v == v else ZERO
    return round(bounded if bounded < high else high)


@inline
def truncated_code(v, top):
    """``trunc(v)`` saturated to 0..top; NaN is 0."""
    v = v if v > ZERO else ZERO
    return np.int32(v if v < top else top)


@inline
def nearest_int(v):
    """``round(v)`` saturated to 32 bits, NaN is 0."""
    if v != v:
        return np.int64(0)
    if v >= np.float32(2147483648.0):
        return np.int64(2147483647)
    if v <= np.float32(-2147483648.0):
        return np.int64(-2147483648)
    return np.int64(v + (BELOW_HALF if v > ZERO else -BELOW_HALF))


@inline
def put_f16(out, block, at, bits):
    out[block, at] = np.uint8(bits & 0xFF)
    out[block, at + 1] = np.uint8(bits >> 8 & 0xFF)


@inline
def largest_magnitude(x, block, size):
    """The first element of largest magnitude, with its sign; +0.0 if all are zero.

    Magnitudes are compared as integers, which order alike, and whose maximum may be taken in any order.
    """
    top = np.int32(0)
    for j in range(size):
        top = max(top, np.int32(bits_of(x[block, j])) & MAGNITUDE)
    if top == 0:
        return ZERO
    first = np.int32(2 * size)
    for j in range(size):
        b = np.int32(bits_of(x[block, j]))
        candidate = np.int32(2 * j) + np.int32(b < 0)
        first = min(first, candidate if b & MAGNITUDE == top else np.int32(2 * size))
    largest = float_of(np.uint32(top))
    return -largest if first & 1 else largest


@inline
def minimum_and_maximum(x, block, size):
    """Compared as integers; of zeros the last is the minimum, as in the reference."""
    low, high = MAGNITUDE, np.int32(-MAGNITUDE)
    for j in range(size):
        b = np.int32(bits_of(x[block, j]))
        key = b ^ (b >> np.int32(31) & MAGNITUDE)
        low = min(low, key)
        high = max(high, key)
    least = float_of(np.uint32(low ^ (low >> np.int32(31) & MAGNITUDE)))
    greatest = float_of(np.uint32(high ^ (high >> np.int32(31) & MAGNITUDE)))
    if least == ZERO:
        for j in range(size):
            least = x[block, j] if x[block, j] == ZERO else least
    return least, greatest


@inline
def reciprocal(d):
    """1 / d, 0 where d is."""
    return ONE / d if d != ZERO else ZERO
