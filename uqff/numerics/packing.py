"""Shared bit primitives in numpy: narrow floats, rounding, and codes packed along a row or across planes.

Nothing here knows a family. All functions are pure, leave their input alone and return new arrays.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "bf16_to_float32",
    "e4m3_to_float32",
    "f16_to_float32",
    "float32_to_bf16",
    "float32_to_e4m3",
    "float32_to_f16",
    "pack_planes",
    "pack_row",
    "packed_rows",
    "round_half_away",
    "unpack_planes",
    "unpack_row",
]

F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]
U16: TypeAlias = npt.NDArray[np.uint16]

# ---------------------------------------------------------------------------------------------------------------------
# Floats
# ---------------------------------------------------------------------------------------------------------------------


def round_half_away(x: F32) -> F32:
    """The nearest integer, ties away from zero, the sign of zero kept: Rust ``f32::round``, C ``roundf``.

    ``trunc(x + 0.5)`` would round 0.49999997 up and large odd integers to even ones; ``x - trunc(x)`` is exact.
    """
    whole = np.trunc(x)
    with np.errstate(invalid="ignore"):
        up = np.abs(x - whole) >= np.float32(0.5)
    return np.where(up, whole + np.copysign(np.float32(1), x), whole)


def float32_to_bf16(x: F32) -> U16:
    """Bit patterns of the nearest bfloat16, ties to even; NaN stays NaN, its sign and high bits kept.

    ::

        float32   s eeeeeeee mmmmmmm|mmmmmmmmmmmmmmmm
        bfloat16  s eeeeeeee mmmmmmm|                   a carry out of m goes into e, up to infinity
    """
    bits = np.asarray(x, np.float32).view(np.uint32)
    round_up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + round_up) >> np.uint32(16)).astype(np.uint16)
    quiet = ((bits >> np.uint32(16)) | np.uint32(0x0040)).astype(np.uint16)
    nearest: U16 = np.where(np.isnan(x), quiet, rounded)
    return nearest


def bf16_to_float32(bits: U16) -> F32:
    """The value of bfloat16 bit patterns; exact."""
    value: F32 = (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return value


def float32_to_f16(x: F32) -> U16:
    """Bit patterns of the nearest float16, ties to even; infinity from 65520 on."""
    with np.errstate(over="ignore"):
        half: U16 = np.asarray(x, np.float32).astype(np.float16).view(np.uint16)
        return half


def f16_to_float32(bits: U16) -> F32:
    """The value of float16 bit patterns; exact. Some CPUs (AArch64) tell of signalling NaN when they widen it."""
    with np.errstate(invalid="ignore"):
        value: F32 = np.asarray(bits).view(np.float16).astype(np.float32)
        return value


E4M3_MAX = np.float32(416)
"""``F8E4M3::MAX`` of the float8 crate, code 0x7D; the largest finite e4m3 number, 448, is its ``INFINITY``."""


def float32_to_e4m3(x: F32) -> U8:
    """Bit patterns of the nearest float8 e4m3 (no infinity), ties to even; infinity and what rounds above 448 give 448.

    NaN gives 0x7F or 0xFF, by its sign. Authority: float8 crate, ``convert_to_fp8`` with ``SatFinite``.

    ::

        s eeee mmm    e = 0: m * 2^-9 (subnormal), else (8 + m) * 2^(e - 10); 0x7E is 448, 0x7F NaN
    """
    x = np.asarray(x, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        magnitude = np.minimum(np.abs(x), np.float32(448))
        exponent = (magnitude.view(np.int32) >> 23) - 127
        # One unit in the last place of the target: 2^-3 of the leading bit's weight, 2^-9 for subnormals. Scaling by a
        # power of two is exact, so np.rint (ties to even) is the only rounding.
        unit = np.maximum(exponent - 3, -9)
        units = np.rint(np.ldexp(magnitude.astype(np.float64), -unit)).astype(np.int64)
    # units is 8..16 above the subnormals (16 carries into the exponent), 0..8 within.
    code = np.where(np.isnan(x), 0x7F, units + 8 * (unit + 9))
    signed: U8 = (code | (np.signbit(x).astype(np.int64) << 7)).astype(np.uint8)
    return signed


def e4m3_to_float32(bits: U8) -> F32:
    """The value of float8 e4m3 bit patterns; exact. 0x7F and 0xFF are NaN."""
    magnitude = np.arange(128, dtype=np.int64)
    exponent, mantissa = magnitude >> 3, (magnitude & 7).astype(np.float64)
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[127] = np.nan
    table: F32 = np.concatenate([values, -values]).astype(np.float32)
    return table[bits]


# ---------------------------------------------------------------------------------------------------------------------
# Codes packed along a row: one little-endian stream of bits, code j at bit j * bits
# ---------------------------------------------------------------------------------------------------------------------


def pack_row(codes: U8, bits: int) -> U8:
    """Pack ``[..., n]`` codes into ``[..., n * bits / 8]`` bytes; ``n * bits`` must be a multiple of 8.

    Code j occupies bits ``j * bits`` to ``j * bits + bits - 1`` of its row, bit 0 being the lowest of the first byte.
    The bytes of a row, read as little-endian words of any width, hold the same stream: there is no padding, so 3- and
    6-bit codes cross bytes and words. Six codes a to f of 3 bits (highest bit of a byte on the left)::

        byte 0  ccbbbaaa
        byte 1  feeedddc
        byte 2  ......ff
    """
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1, bitorder="little")


def unpack_row(packed: U8, bits: int) -> U8:
    """The codes ``[..., n]`` of :func:`pack_row`'s bytes ``[..., n * bits / 8]``."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little")
    stream = stream.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


# ---------------------------------------------------------------------------------------------------------------------
# Codes packed across planes: row r of every plane shares an element, the first plane in its high bits
# ---------------------------------------------------------------------------------------------------------------------

PLANES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""How many codes share an element, by bits per code. Ten 3-bit codes leave the two highest bits of an int32 zero."""


def pack_planes(codes: U8, bits: int) -> npt.NDArray[Any]:
    """Pack ``[rows, columns]`` codes into ``[ceil(rows / planes), columns]`` elements, uint8 or (3 bit) int32.

    The rows are cut into :data:`PLANES` equal runs a, b, c, ...; row r of each run shares element row r::

        8 bit  aaaaaaaa      4 bit  aaaabbbb      2 bit  aabbccdd      1 bit  abcdefgh
        3 bit  00aaabbbcccdddeeefffggghhhiiijjj   (int32)

    Rows are padded with zeros to a multiple of 10 for 3 bit; for the others they must be a multiple of the planes.

    Authority: mistralrs-quant ``hqq/mod.rs``, ``HqqBits::bitpack_type``; mobiusml hqq ``core/bitpack.py``.
    """
    planes = PLANES[bits]
    rows, columns = codes.shape
    height = packed_rows(rows, bits)
    packed = np.zeros((height, columns), np.int32 if bits == 3 else np.uint8)
    for plane in range(planes):
        run = codes[plane * height : (plane + 1) * height]
        packed <<= bits
        packed[: len(run)] |= run
    return packed


def packed_rows(rows: int, bits: int) -> int:
    """Rows of the elements that hold ``rows`` rows of codes.

    Raises:
        ValueError: ``rows`` is not a multiple of the planes; only 3-bit codes are padded.
    """
    planes = PLANES[bits]
    if bits != 3 and rows % planes:
        raise ValueError(f"expected a multiple of {planes} rows for {bits}-bit planes, got {rows}")
    return -(-rows // planes)


def unpack_planes(packed: npt.NDArray[Any], bits: int) -> U8:
    """The codes ``[planes * rows, columns]`` of :func:`pack_planes`; 3-bit padding rows are still there."""
    planes = PLANES[bits]
    top = (1 << bits) - 1
    return np.concatenate([(packed >> (bits * (planes - 1 - p))) & top for p in range(planes)]).astype(np.uint8)
