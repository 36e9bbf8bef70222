"""Kernels for the ggml types: the twins of :mod:`uqff.families.gguf.reference_dequantize`, where the bits are drawn.

The items of a kernel are blocks.  The order of float operations is the reference's, one rounding each.  Where a type
has float16 numbers and integers only, no weight is subnormal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uqff.families.gguf.blocks import Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Q8_1, Q8K, QK, QK_K
from uqff.simd import cast
from uqff.simd.compiling import inline
from uqff.simd.decoding import Decoder, Decoding
from uqff.simd.load_store import load_bytes, load_i8, load_nibbles, load_u8, load_u32
from uqff.simd.output import (
    Bytes,
    f16,
    f16_splat,
    f32,
    looked_up,
    put_pair,
    read_ahead,
    without_subnormals,
    zero_or_from,
)
from uqff.simd.vectors import (
    halves,
    hi_i8_to_f32,
    hi_u8_to_f32,
    i32_to_f32,
    lane,
    lo_i8_to_f32,
    lo_u8_to_f32,
    quarters,
    ramp,
    spread_bits,
)

if TYPE_CHECKING:
    from uqff.families.gguf.tensor import GGUF

__all__ = ["DECODERS", "blocks", "dequantize", "scales_q3k", "scales_q4k"]

# Bytes of a block, and where its fields begin: compiled in as constants.
Q4_0_SIZE, (Q4_0_D, Q4_0_QS) = Q4_0.type_size, Q4_0.layout.offsets
Q4_1_SIZE, (Q4_1_D, Q4_1_M, Q4_1_QS) = Q4_1.type_size, Q4_1.layout.offsets
Q5_0_SIZE, (Q5_0_D, Q5_0_QH, Q5_0_QS) = Q5_0.type_size, Q5_0.layout.offsets
Q5_1_SIZE, (Q5_1_D, Q5_1_M, Q5_1_QH, Q5_1_QS) = Q5_1.type_size, Q5_1.layout.offsets
Q8_0_SIZE, (Q8_0_D, Q8_0_QS) = Q8_0.type_size, Q8_0.layout.offsets
Q8_1_SIZE, (Q8_1_D, Q8_1_S, Q8_1_QS) = Q8_1.type_size, Q8_1.layout.offsets
Q2K_SIZE, (Q2K_SCALES, Q2K_QS, Q2K_D, Q2K_DMIN) = Q2K.type_size, Q2K.layout.offsets
Q3K_SIZE, (Q3K_HMASK, Q3K_QS, Q3K_SCALES, Q3K_D) = Q3K.type_size, Q3K.layout.offsets
Q4K_SIZE, (Q4K_D, Q4K_DMIN, Q4K_SCALES, Q4K_QS) = Q4K.type_size, Q4K.layout.offsets
Q5K_SIZE, (Q5K_D, Q5K_DMIN, Q5K_SCALES, Q5K_QH, Q5K_QS) = Q5K.type_size, Q5K.layout.offsets
Q6K_SIZE, (Q6K_QL, Q6K_QH, Q6K_SCALES, Q6K_D) = Q6K.type_size, Q6K.layout.offsets
Q8K_SIZE, (Q8K_D, Q8K_QS, Q8K_BSUMS) = Q8K.type_size, Q8K.layout.offsets


def dequantize(weight: GGUF, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    if weight.block_type.block_size == 1:
        return cast.cast(weight.parts["data"].array(), weight.nominal_dtype, out, form)
    blocks(weight).dequantize(out, form)
    return True


def blocks(weight: GGUF) -> Decoding:
    """Its blocks."""
    block_type = weight.block_type
    items = weight.numel // block_type.block_size
    decoder, data = DECODERS[block_type.name], weight.parts["data"].array()
    return Decoding(decoder, (data,), items, block_type.block_size)


@looked_up
def _symmetric(codes: Any, d: Any) -> Any:
    return i32_to_f32((codes & 0x0F) - 8) * d


@looked_up
def _affine(codes: Any, d: Any, m: Any) -> Any:
    return i32_to_f32(codes & 0x0F) * d + m


@Decoder
def _q4_0(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at = Q4_0_SIZE * block
        read_ahead(data, at)
        d = f16_splat(data, at + Q4_0_D)
        codes = load_u8(data, at + Q4_0_QS)
        put_pair(out, QK * block, form, _symmetric(codes, d), _symmetric(codes >> 4, d))


@Decoder
def _q4_1(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at = Q4_1_SIZE * block
        read_ahead(data, at)
        d, m = f16_splat(data, at + Q4_1_D), f16_splat(data, at + Q4_1_M)
        codes = load_u8(data, at + Q4_1_QS)
        put_pair(out, QK * block, form, _affine(codes, d, m), _affine(codes >> 4, d, m))


@Decoder
def _q5_0(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at = Q5_0_SIZE * block
        read_ahead(data, at)
        d, qh = f16_splat(data, at + Q5_0_D), load_u32(data, at + Q5_0_QH)
        codes = (load_nibbles(data, at + Q5_0_QS) | spread_bits(qh, 16)) - 16
        put_pair(out, QK * block, form, lo_i8_to_f32(codes) * d, hi_i8_to_f32(codes) * d)


@Decoder
def _q5_1(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at = Q5_1_SIZE * block
        read_ahead(data, at)
        d, m, qh = f16_splat(data, at + Q5_1_D), f16_splat(data, at + Q5_1_M), load_u32(data, at + Q5_1_QH)
        codes = load_nibbles(data, at + Q5_1_QS) | spread_bits(qh, 16)
        put_pair(out, QK * block, form, lo_u8_to_f32(codes) * d + m, hi_u8_to_f32(codes) * d + m)


@inline
def _q8(data: Bytes, out: Any, form: int, lo: int, hi: int, type_size: int, d_at: int, qs_at: int) -> None:
    """Q8_0 and Q8_1: the scale first, the 32 codes last; what Q8_1 has in between is not used."""
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at = type_size * block
        read_ahead(data, at)
        d, codes = f16_splat(data, at + d_at), load_bytes(data, at + qs_at)
        put_pair(out, QK * block, form, lo_i8_to_f32(codes) * d, hi_i8_to_f32(codes) * d)


@Decoder
def _q8_0(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    _q8(data, out, form, lo, hi, Q8_0_SIZE, Q8_0_D, Q8_0_QS)


@Decoder
def _q8_1(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    _q8(data, out, form, lo, hi, Q8_1_SIZE, Q8_1_D, Q8_1_QS)


# K types: the planes are written out, so that all shifts are constants; LLVM does not unroll a loop of this size.


@inline
def _put_q2k(out: Any, at: int, form: int, codes: Any, scales: Any, minimums: Any, group: int) -> None:
    """The 32 weights of groups ``group`` and ``group + 1``."""
    x = lo_u8_to_f32(codes) * lane(scales, group) - lane(minimums, group)
    y = hi_u8_to_f32(codes) * lane(scales, group + 1) - lane(minimums, group + 1)
    put_pair(out, at + 16 * group, form, x, y)


@Decoder
def _q2k(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at, to = Q2K_SIZE * block, QK_K * block
        d, dmin = f16(data, at + Q2K_D), f16(data, at + Q2K_DMIN)
        packed = load_u8(data, at + Q2K_SCALES)
        scales, minimums = i32_to_f32(packed & 0x0F) * d, i32_to_f32(packed >> 4) * dmin
        for run in range(2):
            read_ahead(data, at + Q2K_SIZE // 2 * run)
            qs = load_bytes(data, at + Q2K_QS + 32 * run)
            _put_q2k(out, to, form, qs & 3, scales, minimums, 8 * run)
            _put_q2k(out, to, form, qs >> 2 & 3, scales, minimums, 8 * run + 2)
            _put_q2k(out, to, form, qs >> 4 & 3, scales, minimums, 8 * run + 4)
            _put_q2k(out, to, form, qs >> 6, scales, minimums, 8 * run + 6)


@inline
def scales_q3k(data: Bytes, at: int) -> Any:
    """The 16 six-bit scales, minus 32; four bytes at a time."""
    low, high, top = load_u32(data, at), load_u32(data, at + 4), load_u32(data, at + 8)
    scales = quarters(
        low & 0x0F0F0F0F | (top & 0x03030303) << 4,
        high & 0x0F0F0F0F | (top >> 2 & 0x03030303) << 4,
        low >> 4 & 0x0F0F0F0F | (top >> 4 & 0x03030303) << 4,
        high >> 4 & 0x0F0F0F0F | (top >> 6 & 0x03030303) << 4,
    )
    return (scales >> ramp(8, 4) & 0x3F) - 32


@inline
def _put_scaled(out: Any, at: int, form: int, codes: Any, scales: Any, group: int) -> None:
    """The 32 weights of groups ``group`` and ``group + 1``; the codes are signed."""
    x, y = lo_i8_to_f32(codes) * lane(scales, group), hi_i8_to_f32(codes) * lane(scales, group + 1)
    put_pair(out, at + 16 * group, form, x, y)


@Decoder
def _q3k(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at, to = Q3K_SIZE * block, QK_K * block
        scales = i32_to_f32(scales_q3k(data, at + Q3K_SCALES)) * f16(data, at + Q3K_D)
        third = load_bytes(data, at + Q3K_HMASK)
        for run in range(2):
            read_ahead(data, at + Q3K_SIZE // 2 * run)
            qs = load_bytes(data, at + Q3K_QS + 32 * run)
            _put_scaled(out, to, form, (qs & 3 | (third & 1) << 2) - 4, scales, 8 * run)
            _put_scaled(out, to, form, (qs >> 2 & 3 | (third & 2) << 1) - 4, scales, 8 * run + 2)
            _put_scaled(out, to, form, (qs >> 4 & 3 | third & 4) - 4, scales, 8 * run + 4)
            _put_scaled(out, to, form, (qs >> 6 | third >> 1 & 4) - 4, scales, 8 * run + 6)
            third = third >> 4


@inline
def scales_q4k(data: Bytes, at: int) -> Any:
    """The 8 six-bit scales, then the 8 six-bit minimums; four bytes at a time."""
    s, m, both = load_u32(data, at), load_u32(data, at + 4), load_u32(data, at + 8)
    packed = quarters(
        s & 0x3F3F3F3F,
        both & 0x0F0F0F0F | s >> 2 & 0x30303030,
        m & 0x3F3F3F3F,
        both >> 4 & 0x0F0F0F0F | m >> 2 & 0x30303030,
    )
    return packed >> ramp(8, 4) & 0x3F


@inline
def _put_affine(out: Any, at: int, form: int, codes: Any, scales: Any, group: int) -> None:
    """The 32 weights of a group; lanes 8 to 15 of the scales are the minimums."""
    scale, minimum = lane(scales, group), lane(scales, group + 8)
    put_pair(out, at + 32 * group, form, lo_u8_to_f32(codes) * scale - minimum, hi_u8_to_f32(codes) * scale - minimum)


@inline
def _put_looked_up(out: Any, at: int, form: int, a: Any, b: Any, scales: Any, group: int) -> None:
    """:func:`_put_affine` of codes in the low nibbles of two vectors."""
    scale, minimum = lane(scales, group), lane(scales, group + 8)
    # x - y and x + -y are the same.
    put_pair(out, at + 32 * group, form, _affine(a, scale, -minimum), _affine(b, scale, -minimum))


@Decoder
def _q4k(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at, to = Q4K_SIZE * block, QK_K * block
        scales = i32_to_f32(scales_q4k(data, at + Q4K_SCALES)) * halves(f16(data, at + Q4K_D), f16(data, at + Q4K_DMIN))
        for run in range(4):
            read_ahead(data, at + Q4K_SIZE // 4 * run)
            a, b = load_u8(data, at + Q4K_QS + 32 * run), load_u8(data, at + Q4K_QS + 16 + 32 * run)
            _put_looked_up(out, to, form, a, b, scales, 2 * run)
            _put_looked_up(out, to, form, a >> 4, b >> 4, scales, 2 * run + 1)


@Decoder
def _q5k(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at, to = Q5K_SIZE * block, QK_K * block
        scales = i32_to_f32(scales_q4k(data, at + Q5K_SCALES)) * halves(f16(data, at + Q5K_D), f16(data, at + Q5K_DMIN))
        fifth = load_bytes(data, at + Q5K_QH)
        for run in range(4):
            read_ahead(data, at + Q5K_SIZE // 4 * run)
            qs = load_bytes(data, at + Q5K_QS + 32 * run)
            _put_affine(out, to, form, qs & 0x0F | (fifth & 1) << 4, scales, 2 * run)
            _put_affine(out, to, form, qs >> 4 | (fifth & 2) << 3, scales, 2 * run + 1)
            fifth = fifth >> 2


@Decoder
def _q6k(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    form = without_subnormals(form, True)
    for block in range(lo, hi):
        at, to = Q6K_SIZE * block, QK_K * block
        scales = i32_to_f32(load_i8(data, at + Q6K_SCALES)) * f16(data, at + Q6K_D)
        for run in range(2):
            read_ahead(data, at + Q6K_SIZE // 2 * run)
            read_ahead(data, at + Q6K_SIZE // 2 * run + Q6K_SIZE // 4)
            a, b = load_bytes(data, at + Q6K_QL + 64 * run), load_bytes(data, at + Q6K_QL + 64 * run + 32)
            qh = load_bytes(data, at + Q6K_QH + 32 * run)
            _put_scaled(out, to, form, (a & 0x0F | (qh & 0x03) << 4) - 32, scales, 8 * run)
            _put_scaled(out, to, form, (b & 0x0F | (qh & 0x0C) << 2) - 32, scales, 8 * run + 2)
            _put_scaled(out, to, form, (a >> 4 | qh & 0x30) - 32, scales, 8 * run + 4)
            _put_scaled(out, to, form, (b >> 4 | qh >> 2 & 0x30) - 32, scales, 8 * run + 6)


@Decoder
def _q8k(parts: Any, out: Any, form: int, lo: int, hi: int) -> None:
    (data,) = parts
    for block in range(lo, hi):
        at = Q8K_SIZE * block
        d = f32(data, at + Q8K_D)
        # Integers times d: if d is not subnormal, neither are they.
        to = without_subnormals(form, zero_or_from(np.float32(2.0**-126), d))
        for i in range(0, QK_K, 32):
            read_ahead(data, at + Q8K_QS + i)
            codes = load_bytes(data, at + Q8K_QS + i)
            put_pair(out, QK_K * block + i, to, lo_i8_to_f32(codes) * d, hi_i8_to_f32(codes) * d)


DECODERS: dict[str, Decoder] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q8_1": _q8_1,
    "Q2K": _q2k,
    "Q3K": _q3k,
    "Q4K": _q4k,
    "Q5K": _q5k,
    "Q6K": _q6k,
    "Q8K": _q8k,
}
"""By the type's name."""
