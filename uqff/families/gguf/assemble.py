"""Blocks of the ggml types out of codes and scales that are chosen: what all quantisers of a type end with.

Codes, scales and minimums run along the first axis, blocks along the last, as int32 or int8; ``d``, ``dmin`` and ``m``
are float32 ``[n_blocks]`` and become float16 here.  Fields are put together in file order.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "elements",
    "q2k",
    "q3k",
    "q4_0",
    "q4_1",
    "q4k",
    "q5_0",
    "q5_1",
    "q5k",
    "q6k",
    "q8_0",
    "q8_1",
    "q8k",
    "sub_blocks",
    "whole_blocks",
]

F32: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]
U8: TypeAlias = npt.NDArray[np.uint8]

QK = 32
QK_K = 256


def q4_0(d: F32, q: I32) -> U8:
    """``d f16 | qs 16``; codes 0 to 15."""
    return _fields(_f16(d), _nibbles(q))


def q4_1(d: F32, m: F32, q: I32) -> U8:
    """``d f16 | m f16 | qs 16``; codes 0 to 15."""
    return _fields(_f16(d), _f16(m), _nibbles(q))


def q5_0(d: F32, q: I32) -> U8:
    """``d f16 | qh 4 | qs 16``; codes 0 to 31."""
    return _fields(_f16(d), _fifth_bits(q), _nibbles(q))


def q5_1(d: F32, m: F32, q: I32) -> U8:
    """``d f16 | m f16 | qh 4 | qs 16``; codes 0 to 31."""
    return _fields(_f16(d), _f16(m), _fifth_bits(q), _nibbles(q))


def q8_0(d: F32, q: I32) -> U8:
    """``d f16 | qs 32 x i8``; codes -128 to 127."""
    return _fields(_f16(d), _bytes(q))


def q8_1(d: F32, q: I32) -> U8:
    """``d f16 | s f16 | qs 32 x i8``; s is the sum of the codes (in f16) times d (in f16)."""
    codes_sum = q.sum(axis=0).astype(np.float16).astype(np.float32)
    s = codes_sum * d.astype(np.float16).astype(np.float32)
    return _fields(_f16(d), _f16(s), _bytes(q))


def q2k(d: F32, dmin: F32, scales: I32, mins: I32, q: I32) -> U8:
    """``scales 16 | qs 64 | d f16 | dmin f16``; scales and mins ``[16, n]`` of 4 bits, codes 0 to 3."""
    return _fields(_bytes(scales | mins << 4), _pack_2bit_codes(q), _f16(d), _f16(dmin))


def q3k(d: F32, scales: I32, q: I32) -> U8:
    """``hmask 32 | qs 64 | scales 12 | d f16``; scales ``[16, n]`` plus 32, codes plus 4."""
    # hmask: bit k of byte j is the high bit of element 32 * k + j.
    high = (q >> 2).reshape(8, 32, -1)
    hmask = np.bitwise_or.reduce([high[k] << k for k in range(8)])
    return _fields(_bytes(hmask), _pack_2bit_codes(q & 3), _bytes(_pack_q3k_scales(scales)), _f16(d))


def q4k(d: F32, dmin: F32, scales: I32, mins: I32, q: I32) -> U8:
    """``d f16 | dmin f16 | scales 12 | qs 128``; scales and mins ``[8, n]`` of 6 bits, codes 0 to 15."""
    return _fields(_f16(d), _f16(dmin), _bytes(_pack_k4_scales(scales, mins)), _runs_of_nibbles(q))


def q5k(d: F32, dmin: F32, scales: I32, mins: I32, q: I32) -> U8:
    """``d f16 | dmin f16 | scales 12 | qh 32 | qs 128``; scales and mins ``[8, n]`` of 6 bits, codes 0 to 31."""
    # qh: bit k of byte j is the fifth bit of element 32 * k + j.
    runs = q.reshape(8, 32, -1)
    qh = np.bitwise_or.reduce([runs[k] >> 4 << k for k in range(8)])
    packed = _bytes(_pack_k4_scales(scales, mins))
    return _fields(_f16(d), _f16(dmin), packed, _bytes(qh), _runs_of_nibbles(q & 0xF))


def q6k(d: F32, scales: npt.NDArray[np.int8], q: I32) -> U8:
    """``ql 128 | qh 64 | scales 16 x i8 | d f16``; codes plus 32.

    Of 128 elements, byte j of ql: element j | element 64 + j << 4 (j < 64); byte j of qh, two bits each: elements j,
    32 + j, 64 + j, 96 + j.
    """
    halves = q.reshape(2, 2, 64, -1)
    ql = (halves[:, 0] & 0xF | (halves[:, 1] & 0xF) << 4).reshape(128, -1)
    return _fields(_bytes(ql), _pack_2bit_codes(q >> 4), _bytes(scales), _f16(d))


def q8k(d: F32, q: I32) -> U8:
    """``d f32 | qs 256 x i8 | bsums 16 x i16``; a bsum is the sum of 16 codes."""
    bsums = q.reshape(16, 16, -1).sum(axis=1)
    return _fields(_little_endian(d, "<f4"), _bytes(q), _little_endian(bsums, "<i2"))


def _pack_k4_scales(ls: I32, lm: I32) -> I32:
    """8 scales and 8 mins of 6 bits in 12 bytes.

    byte j      (j < 4)   SS ssssss    scale j,  above it bits 4-5 of scale j + 4
    byte j + 4  (j < 4)   MM mmmmmm    min j,    above it bits 4-5 of min j + 4
    byte j + 8  (j < 4)   mmmm ssss    bits 0-3 of scale j + 4, of min j + 4
    """
    return np.concatenate(
        [ls[:4] | (ls[4:] >> 4) << 6, lm[:4] | (lm[4:] >> 4) << 6, ls[4:] & 0xF | (lm[4:] & 0xF) << 4]
    )


def _pack_q3k_scales(six_bit: I32) -> I32:
    """16 scales of 6 bits in 12 bytes.

    byte j      (j < 8)   bbbb aaaa      bits 0-3 of scale j, of scale j + 8
    byte 8 + j  (j < 4)   dd cc bb aa    bits 4-5 of scales j, j + 4, j + 8, j + 12
    """
    low, high = six_bit & 0xF, six_bit >> 4
    return np.concatenate([low[:8] | low[8:] << 4, high[:4] | high[4:8] << 2 | high[8:12] << 4 | high[12:] << 6])


def _runs_of_nibbles(q: I32) -> U8:
    """A run of 64 elements: low nibble the first 32, high nibble the second 32."""
    pairs = q.reshape(4, 2, 32, -1)
    return _bytes((pairs[:, 0] | pairs[:, 1] << 4).reshape(128, -1))


# ---------------------------------------------------------------------------------------------------------------------
# Layout: elements and fields run along the first axis, blocks along the last
# ---------------------------------------------------------------------------------------------------------------------


def elements(x: F32, block_size: int) -> F32:
    """``[n_blocks, block_size]`` -> ``[block_size, n_blocks]``."""
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != block_size:
        raise ValueError(f"expected float32 [n_blocks, {block_size}], got {x.dtype} {list(x.shape)}")
    return np.ascontiguousarray(x.T)


def sub_blocks(x: F32, size: int) -> F32:
    """``[n_blocks, 256]`` -> ``[size, n_blocks * (256 / size)]``, the sub-blocks of a block side by side."""
    elements(x[:1], QK_K)
    return np.ascontiguousarray(x.reshape(-1, size).T)


def whole_blocks(codes: I32) -> I32:
    """``[size, n_blocks * (256 / size)]`` -> ``[256, n_blocks]``."""
    whole: I32 = codes.T.reshape(-1, QK_K).T
    return whole


def _fields(*fields: U8) -> U8:
    """Fields ``uint8 [n_blocks, size]`` in file order -> blocks."""
    return np.concatenate(fields, axis=1)


def _bytes(codes: npt.NDArray[np.integer]) -> U8:
    """Low bytes of ``[size, n_blocks]`` -> field ``uint8 [n_blocks, size]``."""
    field: U8 = codes.astype(np.uint8).T
    return field


def _little_endian(values: npt.NDArray[np.generic], dtype: str) -> U8:
    """``[n_blocks]`` or ``[count, n_blocks]`` -> field of ``dtype`` items."""
    rows = np.ascontiguousarray(np.atleast_2d(values).T.astype(dtype))
    return rows.view(np.uint8)


def _f16(d: F32) -> U8:
    return _little_endian(d, "<f2")


def _nibbles(q: I32) -> U8:
    """Byte j: element j in the low nibble, element 16 + j in the high one; bits above the fourth are dropped."""
    return _bytes(q[:16] & 0xF | (q[16:] & 0xF) << 4)


def _fifth_bits(q: I32) -> U8:
    """u32 little endian, bit j the fifth bit of element j."""
    bits = ((q >> 4) & 1).reshape(4, 8, -1)
    return _bytes(np.bitwise_or.reduce([bits[:, k] << k for k in range(8)]))


def _pack_2bit_codes(q: I32) -> U8:
    """Two-bit codes; of 128 elements, byte j holds elements j, 32 + j, 64 + j, 96 + j, low bits first."""
    runs = q.reshape(2, 4, 32, -1)
    return _bytes((runs[:, 0] | runs[:, 1] << 2 | runs[:, 2] << 4 | runs[:, 3] << 6).reshape(64, -1))
