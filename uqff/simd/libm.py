"""``logf`` and ``expf`` of glibc within kernels: :mod:`uqff.numerics.glibc`, one element at a time."""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from uqff.numerics.glibc import (
    EXP_PER_LN2,
    EXP_PER_LN2_HEAD,
    EXP_PER_LN2_TAIL,
    EXP_POLYNOMIAL,
    EXP_TABLE,
    LN2,
    LOG_CENTRE,
    LOG_INVERSE_HEAD,
    LOG_INVERSE_TAIL,
    LOG_OFFSET,
    LOG_POLYNOMIAL,
)
from uqff.simd.bits import bits_of, float_of
from uqff.simd.compiling import subroutine

__all__ = ["expf", "logf"]

A0, A1, A2 = LOG_POLYNOMIAL
C0, C1, C2 = EXP_POLYNOMIAL
TWO = np.ldexp(1.0, np.arange(-150, 151))
"""Powers of two from 2^-150 to 2^150; multiplying by one is exact."""


@subroutine
def logf(x):
    """Natural logarithm of a positive, normal, finite float32."""
    bits = np.int32(bits_of(x))
    offset = bits - np.int32(LOG_OFFSET)
    i = np.int64((offset >> np.int32(19)) & np.int32(15))
    k = np.float64(offset >> np.int32(23))
    z = np.float64(float_of(np.uint32(bits - (offset & np.int32(-0x800000)))))
    r = (z * LOG_INVERSE_HEAD[i] - 1.0) + z * LOG_INVERSE_TAIL[i]
    r2 = r * r
    return np.float32((A0 * r2 + (A1 * r + A2)) * r2 + ((LOG_CENTRE[i] + k * LN2) + r))


@subroutine
def expf(x):
    """Exponential of a float32 in [-87, 88]."""
    wide = np.float64(x)
    k = np.rint(wide * EXP_PER_LN2)
    r = (wide * EXP_PER_LN2_HEAD - k) + wide * EXP_PER_LN2_TAIL
    whole = np.int64(k)
    scale = EXP_TABLE[whole & 31] * TWO[(whole >> 5) + 150]
    return np.float32(((C0 * r + C1) * (r * r) + (C2 * r + 1.0)) * scale)
