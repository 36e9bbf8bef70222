"""F8Q8 quantiser, the fast twin of :mod:`uqff.families.f8q8.reference`, bit-equal to it."""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.simd.arithmetic import half_away, signed_code
from uqff.simd.bits import MAGNITUDE, bits_of, copy32, e4m3_code, float_of
from uqff.simd.compiling import kernel
from uqff.simd.scratch import scratch
from uqff.simd.threads import run_ranges

__all__ = ["quantize"]

F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]

BLOCK = 32
BLOCK_BYTES = 1 + BLOCK
PAIR = 2 * BLOCK
"""Blocks are taken in pairs: a loop over 64 elements vectorises, one over 32 is unrolled into scalar code instead."""

E4M3_MAX = np.float32(416)
LARGEST = np.float32(np.finfo(np.float32).max)

GRAIN = 4096
"""Pairs of a range at least."""


def quantize(w: F32, threads: int | None = None) -> U8:
    """See :func:`uqff.families.f8q8.reference.quantize`; ``w`` must be C-contiguous."""
    flat = w.reshape(-1)
    blocks = -(-flat.size // BLOCK)
    pairs, rest = divmod(flat.size, PAIR)
    out = np.empty((blocks, BLOCK_BYTES), np.uint8)
    run_ranges(lambda lo, hi: quantize_pairs(flat, out, lo, hi), pairs, grain=GRAIN, threads=threads)
    if rest:
        last, last_out = np.zeros(PAIR, np.float32), np.empty((2, BLOCK_BYTES), np.uint8)
        last[:rest] = flat[pairs * PAIR :]
        quantize_pairs(last, last_out, 0, 1)
        out[2 * pairs :] = last_out[: blocks - 2 * pairs]
    return out


@kernel
def quantize_pairs(w, out, lo, hi):
    """Pairs of blocks [lo, hi) of the flattened weight."""
    codes = scratch(PAIR, np.uint8)
    for p in range(lo, hi):
        pair = w[p * PAIR : (p + 1) * PAIR]
        first, second = np.uint32(0), np.uint32(0)
        for i in range(PAIR):
            magnitude = bits_of(pair[i]) & MAGNITUDE
            first = max(first, magnitude if i < BLOCK else np.uint32(0))
            second = max(second, magnitude if i >= BLOCK else np.uint32(0))
        d0, d1 = float_of(first) / np.float32(127), float_of(second) / np.float32(127)
        inverse0 = np.float32(0) if d0 == np.float32(0) else np.float32(1) / d0
        inverse1 = np.float32(0) if d1 == np.float32(0) else np.float32(1) / d1
        if max(inverse0, inverse1) <= LARGEST:
            for i in range(PAIR):
                codes[i] = np.uint8(half_away(pair[i] * (inverse0 if i < BLOCK else inverse1)))
        else:
            for i in range(PAIR):
                # 1 / d is infinite (d subnormal): infinity saturates, and 0 * inf, a NaN, gives 0
                product = pair[i] * (inverse0 if i < BLOCK else inverse1)
                codes[i] = np.uint8(np.int32(signed_code(product, np.float32(-128), np.float32(127))))
        out[2 * p, 0] = np.uint8(e4m3_code(bits_of(d0 * E4M3_MAX)))
        out[2 * p + 1, 0] = np.uint8(e4m3_code(bits_of(d1 * E4M3_MAX)))
        copy32(out[2 * p], 1, codes, 0)
        copy32(out[2 * p + 1], 1, codes, BLOCK)
