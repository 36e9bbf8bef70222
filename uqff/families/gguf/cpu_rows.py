"""Products of ggml types with one row of activations: see :mod:`uqff.simd.planes`.

A scale is multiplied with the sum of its codes times activations; codes are signed.  Types that add a number to all
weights of a group form each weight instead, as a weight near zero is the difference of two large numbers there: sums
that take them apart are not as exact as :mod:`uqff.parallel.product_cpu` says.  Codes then stay where they are in a
byte, as multiples of what they are, of which scales have that power of two less.  Products of scales and codes are
exact: a scale has 17 bits at most and a code five.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from uqff.families.gguf import cpu_dequantize as at_
from uqff.families.gguf.blocks import QK_K
from uqff.families.gguf.cpu_dequantize import DECODERS, blocks, scales_q3k, scales_q4k
from uqff.simd import cast
from uqff.simd.compiling import inline
from uqff.simd.load_store import load_bytes, load_f32, load_i8, load_nibbles, load_u8, load_u32, store_f32
from uqff.simd.output import read_ahead
from uqff.simd.planes import (
    BYTES,
    SIGNS,
    byte_planes,
    flipped,
    half_pieces,
    in_order,
    joined,
    load_pieces,
    nibble_planes,
    spread_lanes,
    weigh_four,
)
from uqff.simd.scratch import scratch
from uqff.simd.vectors import halves, i32_to_f32, multiply_add, splat, spread_bits, total

if TYPE_CHECKING:
    from uqff.families.gguf.tensor import GGUF
    from uqff.simd.decoding import Decoding

__all__ = ["decoding"]

ZERO = np.float32(0)
QUARTER, SIXTEENTH = np.float32(1 / 4), np.float32(1 / 16)
BYTE, NIBBLE = np.float32(2.0**-24), np.float32(2.0**-28)
"""What sums of :func:`byte_planes` are multiplied with, for codes in bytes and in their high nibbles."""

_BYTE_OF_BLOCK, _BLOCK = BYTES % 16, BYTES // 16 * 32
FOUR_BLOCKS: Final[npt.NDArray[np.int64]] = np.concatenate([_BLOCK + _BYTE_OF_BLOCK, _BLOCK + _BYTE_OF_BLOCK + 16])
"""Low nibbles of four blocks, then high ones."""


def decoding(weight: GGUF) -> Decoding | None:
    """See :meth:`QuantizedTensor.decoding`."""
    if weight.block_type.block_size == 1:
        return cast.numbers(weight.parts["data"].array(), weight.nominal_dtype)
    return blocks(weight)


def _row(name: str, order: npt.NDArray[np.int64] = BYTES) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return DECODERS[name].by_row(order)


@_row("Q4_0", FOUR_BLOCKS)
def _q4_0(parts, x, lo, hi):
    (data,) = parts
    sums = splat(ZERO)
    for i in range(0, 32 * (hi - lo), 128):
        at = at_.Q4_0_SIZE * min(lo + (i >> 5), hi - 4)
        read_ahead(data, at)
        words = flipped(load_pieces(data, at + at_.Q4_0_QS, at_.Q4_0_SIZE, 4), SIGNS)
        sums = multiply_add(nibble_planes(words, x, i), half_pieces(data, at + at_.Q4_0_D, at_.Q4_0_SIZE, 4), sums)
    return total(sums) * NIBBLE


@_row("Q4_1", FOUR_BLOCKS)
def _q4_1(parts, x, lo, hi):
    (data,) = parts
    a = b = splat(ZERO)
    for i in range(0, 32 * (hi - lo), 128):
        at = at_.Q4_1_SIZE * min(lo + (i >> 5), hi - 4)
        read_ahead(data, at)
        words = load_pieces(data, at + at_.Q4_1_QS, at_.Q4_1_SIZE, 4)
        d = half_pieces(data, at + at_.Q4_1_D, at_.Q4_1_SIZE, 4)
        m = half_pieces(data, at + at_.Q4_1_M, at_.Q4_1_SIZE, 4)
        a, b = weigh_four(words, 8, 0x0F, d, m, x, i, a, b)
        in_order()
        words = load_pieces(data, at + at_.Q4_1_QS, at_.Q4_1_SIZE, 4)
        a, b = weigh_four(words, 8, 0xF0, d * SIXTEENTH, m, x, i + 64, a, b)
    return total(a + b)


@inline
def _five_bits(data, at, qh, qs):
    """32 codes, 16 less."""
    return (load_nibbles(data, at + qs) | spread_bits(load_u32(data, at + qh), 16)) - 16


@_row("Q5_0")
def _q5_0(parts, x, lo, hi):
    (data,) = parts
    sums, size, qh, qs = splat(ZERO), at_.Q5_0_SIZE, at_.Q5_0_QH, at_.Q5_0_QS
    for i in range(0, 32 * (hi - lo), 64):
        at = size * min(lo + (i >> 5), hi - 2)
        read_ahead(data, at)
        words = joined(_five_bits(data, at, qh, qs), _five_bits(data, at + size, qh, qs))
        sums = multiply_add(byte_planes(words, x, i), half_pieces(data, at + at_.Q5_0_D, at_.Q5_0_SIZE, 2), sums)
    return total(sums) * BYTE


@_row("Q5_1")
def _q5_1(parts, x, lo, hi):
    (data,) = parts
    a, b, size = splat(ZERO), splat(ZERO), at_.Q5_1_SIZE
    for i in range(0, 32 * (hi - lo), 64):
        at = size * min(lo + (i >> 5), hi - 2)
        read_ahead(data, at)
        low = load_nibbles(data, at + at_.Q5_1_QS) | spread_bits(load_u32(data, at + at_.Q5_1_QH), 16)
        at_2 = at + size
        high = load_nibbles(data, at_2 + at_.Q5_1_QS) | spread_bits(load_u32(data, at_2 + at_.Q5_1_QH), 16)
        d, m = half_pieces(data, at + at_.Q5_1_D, size, 2), half_pieces(data, at + at_.Q5_1_M, size, 2)
        a, b = weigh_four(joined(low, high), 8, 0xFF, d, m, x, i, a, b)
    return total(a + b)


@inline
def _q8(data, x, lo, hi, size, d_at, qs_at):
    sums = splat(ZERO)
    for i in range(0, 32 * (hi - lo), 64):
        at = size * min(lo + (i >> 5), hi - 2)
        read_ahead(data, at)
        words = load_pieces(data, at + qs_at, size, 2)
        sums = multiply_add(byte_planes(words, x, i), half_pieces(data, at + d_at, size, 2), sums)
    return total(sums) * BYTE


@_row("Q8_0")
def _q8_0(parts, x, lo, hi):
    return _q8(parts[0], x, lo, hi, at_.Q8_0_SIZE, at_.Q8_0_D, at_.Q8_0_QS)


@_row("Q8_1")
def _q8_1(parts, x, lo, hi):
    return _q8(parts[0], x, lo, hi, at_.Q8_1_SIZE, at_.Q8_1_D, at_.Q8_1_QS)


_RUN: Final[npt.NDArray[np.int64]] = BYTES % 32 + BYTES // 32 * 128
TWO_RUNS: Final[npt.NDArray[np.int64]] = np.concatenate([_RUN + 32 * plane for plane in range(4)])
"""Plane by plane of two runs of 128 weights, 32 bytes each: so of 64 weights that lie side by side, in four groups."""


@_row("Q2K", TWO_RUNS)
def _q2k(parts, x, lo, hi):
    (data,) = parts
    a = b = splat(ZERO)
    for block in range(lo, hi):
        at, i = at_.Q2K_SIZE * block, QK_K * (block - lo)
        read_ahead(data, at)
        read_ahead(data, at + 64)
        packed = load_u8(data, at + at_.Q2K_SCALES)
        s = i32_to_f32(packed & 0x0F) * half_pieces(data, at + at_.Q2K_D, 0, 1)
        m = i32_to_f32(packed >> 4) * half_pieces(data, at + at_.Q2K_DMIN, 0, 1) * np.float32(-1)
        qs = at + at_.Q2K_QS
        words = load_pieces(data, qs, 0, 1)
        a, b = weigh_four(words, 8, 3, spread_lanes(s, 0, 1, 8, 9), spread_lanes(m, 0, 1, 8, 9), x, i, a, b)
        in_order()
        words, s = load_pieces(data, qs, 0, 1), s * QUARTER
        a, b = weigh_four(words, 8, 12, spread_lanes(s, 2, 3, 10, 11), spread_lanes(m, 2, 3, 10, 11), x, i + 64, a, b)
        in_order()
        words, s = load_pieces(data, qs, 0, 1), s * QUARTER
        a, b = weigh_four(words, 8, 48, spread_lanes(s, 4, 5, 12, 13), spread_lanes(m, 4, 5, 12, 13), x, i + 128, a, b)
        in_order()
        words, s = load_pieces(data, qs, 0, 1), s * QUARTER
        a, b = weigh_four(words, 8, 192, spread_lanes(s, 6, 7, 14, 15), spread_lanes(m, 6, 7, 14, 15), x, i + 192, a, b)
        in_order()
    return total(a + b)


@_row("Q3K", TWO_RUNS)
def _q3k(parts, x, lo, hi):
    (data,) = parts
    sums = splat(ZERO)
    for block in range(lo, hi):
        at, i = at_.Q3K_SIZE * block, QK_K * (block - lo)
        read_ahead(data, at)
        read_ahead(data, at + 64)
        scales = i32_to_f32(scales_q3k(data, at + at_.Q3K_SCALES)) * half_pieces(data, at + at_.Q3K_D, 0, 1)
        # The third bit is that of a plane of the first run, and four bits on that of the second. Flipped, codes are
        # signed: of three bits in the highest of a byte.
        third = load_bytes(data, at + at_.Q3K_HMASK)
        third = flipped(joined(third << 4, third), 0xF0F0F0F0)
        words = load_pieces(data, at + at_.Q3K_QS, 0, 1)
        codes = (words << 5 & 0x60606060) | (third << 3 & 0x80808080)
        found = byte_planes(codes, x, i) * spread_lanes(scales, 0, 1, 8, 9)
        codes = (words << 3 & 0x60606060) | (third << 2 & 0x80808080)
        found = multiply_add(byte_planes(codes, x, i + 64), spread_lanes(scales, 2, 3, 10, 11), found)
        codes = (words << 1 & 0x60606060) | (third << 1 & 0x80808080)
        found = multiply_add(byte_planes(codes, x, i + 128), spread_lanes(scales, 4, 5, 12, 13), found)
        codes = (words >> 1 & 0x60606060) | (third & 0x80808080)
        found = multiply_add(byte_planes(codes, x, i + 192), spread_lanes(scales, 6, 7, 14, 15), found)
        sums = sums + found
    return total(sums) * np.float32(2.0**-29)


_TWO_GROUPS: Final[npt.NDArray[np.int64]] = BYTES % 32 + BYTES // 32 * 64
FOUR_GROUPS: Final[npt.NDArray[np.int64]] = np.concatenate(
    [_TWO_GROUPS, _TWO_GROUPS + 32, _TWO_GROUPS + 128, _TWO_GROUPS + 160]
)
"""Low nibbles of two runs of 32 bytes, then high ones; then of the next two."""

# Of eight scales, those of high nibbles are sixteenths; of minimums, the sign.
_Q4K_FACTORS: Final[npt.NDArray[np.float32]] = np.array([1, 1 / 16] * 4 + [-1] * 8, np.float32)
_Q5K_FACTORS: Final[npt.NDArray[np.float32]] = np.array([1] * 8 + [-1] * 8, np.float32)


@_row("Q4K", FOUR_GROUPS)
def _q4k(parts, x, lo, hi):
    (data,) = parts
    a = b = splat(ZERO)
    s, factors = scratch(16, np.float32), load_f32(_Q4K_FACTORS, 0)
    for block in range(lo, hi):
        at, i = at_.Q4K_SIZE * block, QK_K * (block - lo)
        read_ahead(data, at)
        read_ahead(data, at + 64)
        scales = i32_to_f32(scales_q4k(data, at + at_.Q4K_SCALES)) * half_pieces(data, at + at_.Q4K_D, 2, 2)
        store_f32(s, 0, scales * factors)
        for run in range(2):
            j, k = 4 * run, i + 128 * run
            words = load_pieces(data, at + at_.Q4K_QS + 64 * run, 0, 1)
            a, b = weigh_four(words, 8, 0x0F, halves(s[j], s[j + 2]), halves(s[j + 8], s[j + 10]), x, k, a, b)
            in_order()
            words = load_pieces(data, at + at_.Q4K_QS + 64 * run, 0, 1)
            a, b = weigh_four(words, 8, 0xF0, halves(s[j + 1], s[j + 3]), halves(s[j + 9], s[j + 11]), x, k + 64, a, b)
            in_order()
    return total(a + b)


@_row("Q5K", FOUR_GROUPS)
def _q5k(parts, x, lo, hi):
    (data,) = parts
    a = b = splat(ZERO)
    s, signs = scratch(16, np.float32), load_f32(_Q5K_FACTORS, 0)
    for block in range(lo, hi):
        at, i = at_.Q5K_SIZE * block, QK_K * (block - lo)
        read_ahead(data, at)
        read_ahead(data, at + 64)
        read_ahead(data, at + 128)
        scales = i32_to_f32(scales_q4k(data, at + at_.Q5K_SCALES)) * half_pieces(data, at + at_.Q5K_D, 2, 2)
        store_f32(s, 0, scales * signs)
        for run in range(2):
            j, k = 4 * run, i + 128 * run
            # The fifth bits of a run are those of two planes, of the next run of the next two.
            fifth = load_pieces(data, at + at_.Q5K_QH, 0, 2) >> halves(j, j + 2)
            words = load_pieces(data, at + at_.Q5K_QS + 64 * run, 0, 1)
            codes = (words & 0x0F0F0F0F) | (fifth << 4 & 0x10101010)
            a, b = weigh_four(codes, 8, 0xFF, halves(s[j], s[j + 2]), halves(s[j + 8], s[j + 10]), x, k, a, b)
            in_order()
            fifth = load_pieces(data, at + at_.Q5K_QH, 0, 2) >> halves(j, j + 2)
            words = load_pieces(data, at + at_.Q5K_QS + 64 * run, 0, 1)
            codes = (words >> 4 & 0x0F0F0F0F) | (fifth << 3 & 0x10101010)
            a, b = weigh_four(codes, 8, 0xFF, halves(s[j + 1], s[j + 3]), halves(s[j + 9], s[j + 11]), x, k + 64, a, b)
            in_order()
    return total(a + b)


@_row("Q6K", TWO_RUNS)
def _q6k(parts, x, lo, hi):
    (data,) = parts
    sums = splat(ZERO)
    for block in range(lo, hi):
        at, i = at_.Q6K_SIZE * block, QK_K * (block - lo)
        read_ahead(data, at)
        read_ahead(data, at + 64)
        read_ahead(data, at + 128)
        scales = i32_to_f32(load_i8(data, at + at_.Q6K_SCALES)) * half_pieces(data, at + at_.Q6K_D, 0, 1)
        # Flipped, codes are signed: six bits in the highest of a byte.
        top = flipped(load_pieces(data, at + at_.Q6K_QH, 0, 1), 0xAAAAAAAA)
        a = load_pieces(data, at + at_.Q6K_QL, 64, 2)
        codes = (a << 2 & 0x3C3C3C3C) | (top << 6 & 0xC0C0C0C0)
        found = byte_planes(codes, x, i) * spread_lanes(scales, 0, 1, 8, 9)
        codes = (a >> 2 & 0x3C3C3C3C) | (top << 2 & 0xC0C0C0C0)
        found = multiply_add(byte_planes(codes, x, i + 128), spread_lanes(scales, 4, 5, 12, 13), found)
        b = load_pieces(data, at + at_.Q6K_QL + 32, 64, 2)
        codes = (b << 2 & 0x3C3C3C3C) | (top << 4 & 0xC0C0C0C0)
        found = multiply_add(byte_planes(codes, x, i + 64), spread_lanes(scales, 2, 3, 10, 11), found)
        codes = (b >> 2 & 0x3C3C3C3C) | (top & 0xC0C0C0C0)
        found = multiply_add(byte_planes(codes, x, i + 192), spread_lanes(scales, 6, 7, 14, 15), found)
        sums = sums + found
    return total(sums) * np.float32(2.0**-26)
