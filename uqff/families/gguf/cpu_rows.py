"""Products of ggml types with one row of activations: see :mod:`uqff.simd.planes`.

A scale is multiplied with the sum of its codes times activations.  Codes are signed, if necessary by taking half of
their range off: the number added to a group's weights is that of the middle code then, and is multiplied with the sum
of the group's activations.  So nothing large cancels.
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
from uqff.simd.dots import spread_8, total_8
from uqff.simd.load_store import load_bytes, load_f32, load_i8, load_nibbles, load_u8, load_u32
from uqff.simd.output import read_ahead
from uqff.simd.planes import (
    BYTES,
    HIGH,
    SIGNS,
    byte_planes,
    flipped,
    half_pieces,
    high_half,
    joined,
    load_f32_8,
    load_pieces,
    low_half,
    nibble_planes,
    spread,
    spread_lanes,
)
from uqff.simd.vectors import i32_to_f32, multiply_add, splat, spread_bits, total

if TYPE_CHECKING:
    from uqff.families.gguf.tensor import GGUF
    from uqff.simd.decoding import Decoding

__all__ = ["decoding"]

ZERO, EIGHT, SIXTEEN = (np.float32(value) for value in (0, 8, 16))
BYTE, NIBBLE = np.float32(2.0**-24), np.float32(2.0**-28)
"""What sums of :func:`byte_planes` are multiplied with, for codes in bytes and in their high nibbles."""

SUMS: Final = {"Q4_1": 32, "Q5_1": 32, "Q2K": 16, "Q4K": 32, "Q5K": 32}
"""Activations that are added up, by the type's name: those of a group of weights that has a minimum."""

_BYTE_OF_BLOCK, _BLOCK = BYTES % 16, BYTES // 16 * 32
FOUR_BLOCKS: Final[npt.NDArray[np.int64]] = np.concatenate([_BLOCK + _BYTE_OF_BLOCK, _BLOCK + _BYTE_OF_BLOCK + 16])
"""Low nibbles of four blocks, then high ones."""


def decoding(weight: GGUF) -> Decoding | None:
    """See :meth:`QuantizedTensor.decoding`."""
    if weight.block_type.block_size == 1:
        return cast.numbers(weight.parts["data"].array(), weight.nominal_dtype)
    return blocks(weight, SUMS.get(weight.block_type.name, 0))


def _row(
    name: str, order: npt.NDArray[np.int64] = BYTES, *, overlap: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return DECODERS[name].by_row(order, overlap=overlap)


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


@_row("Q4_1", FOUR_BLOCKS, overlap=False)
def _q4_1(parts, x, lo, hi):
    (data,) = parts
    sums, others, n = splat(ZERO), splat(ZERO), 32 * (hi - lo)
    for i in range(0, n, 128):
        at = at_.Q4_1_SIZE * (lo + (i >> 5))
        read_ahead(data, at)
        words = flipped(load_pieces(data, at + at_.Q4_1_QS, at_.Q4_1_SIZE, 4), SIGNS)
        d = half_pieces(data, at + at_.Q4_1_D, at_.Q4_1_SIZE, 4)
        middle = multiply_add(d, splat(EIGHT), half_pieces(data, at + at_.Q4_1_M, at_.Q4_1_SIZE, 4))
        sums = multiply_add(nibble_planes(words, x, i), d, sums)
        others = multiply_add(middle, spread(x, n + (i >> 5), 4), others)
    return total(sums) * NIBBLE + total(others) * np.float32(0.25)


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


@_row("Q5_1", overlap=False)
def _q5_1(parts, x, lo, hi):
    (data,) = parts
    sums, others, size, qh, qs = splat(ZERO), splat(ZERO), at_.Q5_1_SIZE, at_.Q5_1_QH, at_.Q5_1_QS
    n = 32 * (hi - lo)
    for i in range(0, n, 64):
        at = size * (lo + (i >> 5))
        read_ahead(data, at)
        words = joined(_five_bits(data, at, qh, qs), _five_bits(data, at + size, qh, qs))
        d = half_pieces(data, at + at_.Q5_1_D, at_.Q5_1_SIZE, 2)
        middle = multiply_add(d, splat(SIXTEEN), half_pieces(data, at + at_.Q5_1_M, at_.Q5_1_SIZE, 2))
        sums = multiply_add(byte_planes(words, x, i), d, sums)
        others = multiply_add(middle, spread(x, n + (i >> 5), 2), others)
    return total(sums) * BYTE + total(others) * np.float32(0.125)


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


@inline
def _two_bits(words, x, i, mask):
    """Codes of 128 bytes' worth of activations in bits of a plane of 64 bytes; lane l: those of word l."""
    sums = i32_to_f32(words & mask) * load_f32(x, i)
    sums = multiply_add(i32_to_f32(words >> 8 & mask), load_f32(x, i + 16), sums)
    sums = multiply_add(i32_to_f32(words >> 16 & mask), load_f32(x, i + 32), sums)
    return multiply_add(i32_to_f32(words >> 24 & mask), load_f32(x, i + 48), sums)


_RUN: Final[npt.NDArray[np.int64]] = BYTES % 32 + BYTES // 32 * 128
TWO_RUNS: Final[npt.NDArray[np.int64]] = np.concatenate([_RUN + 32 * plane for plane in range(4)])
"""Plane by plane of two runs of 128 weights, 32 bytes each: so of 64 weights that lie side by side, in four groups."""


@_row("Q2K", TWO_RUNS)
def _q2k(parts, x, lo, hi):
    (data,) = parts
    sums, others, n = splat(ZERO), splat(ZERO), QK_K * (hi - lo)
    for block in range(lo, hi):
        at, i = at_.Q2K_SIZE * block, QK_K * (block - lo)
        read_ahead(data, at)
        read_ahead(data, at + 64)
        packed = load_u8(data, at + at_.Q2K_SCALES)
        scales = i32_to_f32(packed & 0x0F) * half_pieces(data, at + at_.Q2K_D, 0, 1)
        words = load_pieces(data, at + at_.Q2K_QS, 0, 1)
        # A code in higher bits is a multiple of it.
        found = _two_bits(words, x, i, 3) * spread_lanes(scales, 0, 1, 8, 9)
        scales = scales * np.float32(0.25)
        found = multiply_add(_two_bits(words, x, i + 64, 12), spread_lanes(scales, 2, 3, 10, 11), found)
        scales = scales * np.float32(0.25)
        found = multiply_add(_two_bits(words, x, i + 128, 48), spread_lanes(scales, 4, 5, 12, 13), found)
        scales = scales * np.float32(0.25)
        found = multiply_add(_two_bits(words, x, i + 192, 192), spread_lanes(scales, 6, 7, 14, 15), found)
        sums = sums + found
        minimums = i32_to_f32(packed >> 4) * half_pieces(data, at + at_.Q2K_DMIN, 0, 1)
        others = multiply_add(minimums, load_f32(x, n + (i >> 4)), others)
    return total(sums - others)


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


@inline
def _middles(scales, half):
    """Eight scales, then eight minimums: what is added to the groups if ``half`` is taken off their codes."""
    return low_half(scales) * half - high_half(scales)


_TWO_GROUPS: Final[npt.NDArray[np.int64]] = BYTES % 32 + BYTES // 32 * 64
FOUR_GROUPS: Final[npt.NDArray[np.int64]] = np.concatenate(
    [_TWO_GROUPS, _TWO_GROUPS + 32, _TWO_GROUPS + 128, _TWO_GROUPS + 160]
)
"""Low nibbles of two runs of 32 bytes, then high ones; then of the next two."""


@inline
def _two_runs(words, x, i, low, high):
    """Two scales for the low nibbles, two for the high ones."""
    return multiply_add(byte_planes(words & HIGH, x, i + 64), high, byte_planes(words << 4 & HIGH, x, i) * low)


@_row("Q4K", FOUR_GROUPS)
def _q4k(parts, x, lo, hi):
    (data,) = parts
    sums, others, n = splat(ZERO), spread_8(ZERO), QK_K * (hi - lo)
    for block in range(lo, hi):
        at, i = at_.Q4K_SIZE * block, QK_K * (block - lo)
        read_ahead(data, at)
        read_ahead(data, at + 64)
        scales = i32_to_f32(scales_q4k(data, at + at_.Q4K_SCALES)) * half_pieces(data, at + at_.Q4K_D, 2, 2)
        words = flipped(load_pieces(data, at + at_.Q4K_QS, 0, 1), SIGNS)
        sums = sums + _two_runs(words, x, i, spread_lanes(scales, 0, 0, 2, 2), spread_lanes(scales, 1, 1, 3, 3))
        words = flipped(load_pieces(data, at + at_.Q4K_QS + 64, 0, 1), SIGNS)
        sums = sums + _two_runs(words, x, i + 128, spread_lanes(scales, 4, 4, 6, 6), spread_lanes(scales, 5, 5, 7, 7))
        others = others + _middles(scales, EIGHT) * load_f32_8(x, n + (i >> 5))
    return total(sums) * NIBBLE + total_8(others)


@inline
def _five_bit_run(qs, fifth, x, i, scales):
    """64 codes, those in the low nibbles, then those in the high ones."""
    low, high = (qs & 0x0F | (fifth & 1) << 4) - 16, (qs >> 4 | (fifth & 2) << 3) - 16
    return byte_planes(joined(low, high), x, i) * scales


@_row("Q5K")
def _q5k(parts, x, lo, hi):
    (data,) = parts
    sums, others, n = splat(ZERO), spread_8(ZERO), QK_K * (hi - lo)
    for block in range(lo, hi):
        at, i = at_.Q5K_SIZE * block, QK_K * (block - lo)
        read_ahead(data, at)
        read_ahead(data, at + 64)
        read_ahead(data, at + 128)
        scales = i32_to_f32(scales_q4k(data, at + at_.Q5K_SCALES)) * half_pieces(data, at + at_.Q5K_D, 2, 2)
        fifth, qs = load_bytes(data, at + at_.Q5K_QH), at + at_.Q5K_QS
        sums = sums + _five_bit_run(load_bytes(data, qs), fifth, x, i, spread_lanes(scales, 0, 0, 1, 1))
        sums = sums + _five_bit_run(load_bytes(data, qs + 32), fifth >> 2, x, i + 64, spread_lanes(scales, 2, 2, 3, 3))
        sums = sums + _five_bit_run(load_bytes(data, qs + 64), fifth >> 4, x, i + 128, spread_lanes(scales, 4, 4, 5, 5))
        sums = sums + _five_bit_run(load_bytes(data, qs + 96), fifth >> 6, x, i + 192, spread_lanes(scales, 6, 6, 7, 7))
        others = others + _middles(scales, SIXTEEN) * load_f32_8(x, n + (i >> 5))
    return total(sums) * BYTE + total_8(others)


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
