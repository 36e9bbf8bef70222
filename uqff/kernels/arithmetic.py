"""The engine's scalar arithmetic for the compiled kernels, and how they are compiled.

numba's on-disk cache looks at the file of a kernel, not at this one: after a change here remove the ``*.nbi`` files of
the kernels from ``__pycache__``.

* Without ``fastmath`` the compiler neither reorders float operations nor fuses a product into a sum.
* ``round`` then saturate equals saturate then ``round``, as all bounds are integers: so a float is clamped before it
  becomes an integer, and the conversion never overflows.
* Half away from zero is ``trunc(v +- 0.49999997)``, 0.49999997 being the float below one half. With 0.5 it would be
  wrong for 0.49999997 itself, and for odd integers from 2^23 on; with its neighbour it is right for every float32.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = TypeVar("Function", bound=Callable[..., Any])

BELOW_HALF = np.float32(0.49999997)
ZERO = np.float32(0)
ONE = np.float32(1)
MAGNITUDE = np.int32(0x7FFFFFFF)


def kernel(function: Function) -> Function:
    """Compiles what Python calls, at its first call; releases the GIL; kept on disk."""
    return cast("Function", njit(nogil=True, cache=True, error_model="numpy", fastmath=False)(function))


def inline(function: Function) -> Function:
    """Compiles what kernels call, into each of them, so that sizes are constants there."""
    return cast("Function", njit(forceinline=True, error_model="numpy", fastmath=False)(function))


@inline
def round(v):
    """``v`` rounded half away from zero, as a float; only for -2^31 < v < 2^31."""
    return np.float32(np.int32(v + (BELOW_HALF if v > ZERO else -BELOW_HALF)))


@inline
def unsigned_code(v, top):
    """``round(v)`` saturated to 0..top, as a float; NaN is 0."""
    v = v if v > ZERO else ZERO
    v = v if v < top else top
    return np.float32(np.int32(v + BELOW_HALF))


@inline
def signed_code(v, low, high):
    """``round(v)`` saturated to low..high, as a float; NaN is 0."""
    v = v if v == v else ZERO
    v = v if v > low else low
    v = v if v < high else high
    return round(v)


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
def f16_bits(v):
    """float32 -> the bits of the nearest float16, ties to even."""
    bits = np.int64(np.float32(v).view(np.int32)) & 0xFFFFFFFF
    sign = (bits >> 16) & 0x8000
    bits &= 0x7FFFFFFF
    if bits > 0x7F800000:
        return sign | 0x7E00 | (bits >> 13 & 0x3FF)
    if bits >= 0x477FF000:
        return sign | 0x7C00
    if bits >= 0x38800000:
        return sign | (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13
    # Subnormal: in units of 2^-24 what the addition of 0.5 leaves in the low bits of its sum, rounded by the addition.
    summed = np.float32(np.int32(bits).view(np.float32) + np.float32(0.5))
    return sign | (np.int64(summed.view(np.int32)) - 0x3F000000)


@inline
def f16_value(bits):
    """The bits of a float16 -> its value in float32."""
    exponent = bits >> 10 & 0x1F
    mantissa = bits & 0x3FF
    if exponent == 0:
        magnitude = np.float32(np.float32(mantissa) * np.float32(2.0**-24))
    else:
        wide = 0x7F800000 | mantissa << 13 if exponent == 0x1F else (exponent + 112) << 23 | mantissa << 13
        magnitude = np.int32(wide).view(np.float32)
    return -magnitude if bits & 0x8000 else magnitude


@inline
def put_f16(out, block, at, bits):
    out[block, at] = np.uint8(bits & 0xFF)
    out[block, at + 1] = np.uint8(bits >> 8 & 0xFF)


@inline
def largest_magnitude(x, block, size):
    """The first element of largest magnitude, with its sign; +0.0 if all are zero.

    Magnitudes are compared as integers, which order alike, and whose maximum may be taken in any order.
    """
    bits = x.view(np.int32)
    top = np.int32(0)
    for j in range(size):
        top = max(top, bits[block, j] & MAGNITUDE)
    if top == 0:
        return ZERO
    first = np.int32(2 * size)
    for j in range(size):
        b = bits[block, j]
        candidate = np.int32(2 * j) + np.int32(b < 0)
        first = min(first, candidate if b & MAGNITUDE == top else np.int32(2 * size))
    largest = np.int32(top).view(np.float32)
    return -largest if first & 1 else largest


@inline
def minimum_and_maximum(x, block, size):
    """Compared as integers; of zeros the last is the minimum, as in the reference."""
    bits = x.view(np.int32)
    low, high = MAGNITUDE, np.int32(-MAGNITUDE)
    for j in range(size):
        b = bits[block, j]
        key = b ^ (b >> np.int32(31) & MAGNITUDE)
        low = min(low, key)
        high = max(high, key)
    least = np.int32(low ^ (low >> np.int32(31) & MAGNITUDE)).view(np.float32)
    greatest = np.int32(high ^ (high >> np.int32(31) & MAGNITUDE)).view(np.float32)
    if least == ZERO:
        for j in range(size):
            least = x[block, j] if x[block, j] == ZERO else least
    return least, greatest


@inline
def reciprocal(d):
    """1 / d, 0 where d is."""
    return ONE / d if d != ZERO else ZERO
