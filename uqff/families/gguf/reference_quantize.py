"""Quantisers of the ggml block types, byte for byte what the engine writes: the reference, slow and obvious.

Every ``quantize_<type>`` takes float32 blocks ``[n_blocks, block_size]`` and returns their bytes
``uint8 [n_blocks, type_size]``. It vectorises over blocks; within a block it keeps the engine's scalar order: one
float32 rounding per operation, no fused multiply-add, sums element after element. (``np.sum`` adds in pairs and would
change the last bit.)

Authority: candle-core ``src/quantized/k_quants.rs`` (``from_float`` of each block) and ``src/quantized/utils.rs``
(``make_qkx1_quants``, ``make_q3_quants``, ``make_qx_quants``), 0.10.2.

What the engine's operations mean at the edges:

* ``round`` goes half away from zero; a float becomes an integer by truncation that saturates, NaN becomes 0; a wider
  integer becomes a narrower one by dropping high bits.
* Overflow to infinity and underflow to zero happen as in IEEE 754, also inside the searches.
* Of equal zeros a minimum or maximum takes the later one, as the engine's instructions do in this order. Its compiler
  may reorder them, so the sign of a zero ``m`` of Q4_1 and Q5_1, and of a zero ``dmin`` of Q4K and Q5K, differs between
  the engine's releases: compare these fields as floats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.gguf import assemble
from uqff.families.gguf.assemble import whole_blocks
from uqff.families.gguf.search import (
    at_least_zero_maximum,
    inverse,
    largest_magnitude,
    maximum,
    minimum,
    nearest_int,
    round_half_away,
    saturate,
    search_q3_scale,
    search_q6_scale,
    search_scale_and_min,
    widened_f16,
)

if TYPE_CHECKING:
    from collections.abc import Callable

F32: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]
U8: TypeAlias = npt.NDArray[np.uint8]

QK = 32
QK_K = 256

# ---------------------------------------------------------------------------------------------------------------------
# Blocks of 32 with one scale
# ---------------------------------------------------------------------------------------------------------------------


def quantize_q4_0(x: F32) -> U8:
    """Q4_0: ``d f16 | qs 16``, w = d * (q - 8). The element of largest magnitude, sign included, becomes code 0."""
    with np.errstate(all="ignore"):
        d = largest_magnitude(assemble.elements(x, QK)) / np.float32(-8)
        q = np.minimum(saturate(assemble.elements(x, QK) * inverse(d) + np.float32(8.5), 0, 255), 15)
        return assemble.q4_0(d, q)


def quantize_q4_1(x: F32) -> U8:
    """Q4_1: ``d f16 | m f16 | qs 16``, w = d * q + m."""
    with np.errstate(all="ignore"):
        elements = assemble.elements(x, QK)
        low, high = minimum(elements), maximum(elements)
        d = (high - low) / np.float32(15)
        q = np.minimum(saturate((elements - low) * inverse(d) + np.float32(0.5), 0, 255), 15)
        return assemble.q4_1(d, low, q)


def quantize_q5_0(x: F32) -> U8:
    """Q5_0: ``d f16 | qh 4 | qs 16``, w = d * (q - 16)."""
    with np.errstate(all="ignore"):
        elements = assemble.elements(x, QK)
        d = largest_magnitude(elements) / np.float32(-16)
        q = np.minimum(saturate(elements * inverse(d) + np.float32(16.5), -128, 127), 31)
        return assemble.q5_0(d, q)


def quantize_q5_1(x: F32) -> U8:
    """Q5_1: ``d f16 | m f16 | qh 4 | qs 16``, w = d * q + m."""
    with np.errstate(all="ignore"):
        elements = assemble.elements(x, QK)
        low, high = minimum(elements), maximum(elements)
        d = (high - low) / np.float32(31)
        q = saturate((elements - low) * inverse(d) + np.float32(0.5), 0, 255)
        return assemble.q5_1(d, low, q)


def quantize_q8_0(x: F32) -> U8:
    """Q8_0: ``d f16 | qs 32 x i8``, w = d * q."""
    with np.errstate(all="ignore"):
        elements = assemble.elements(x, QK)
        d = np.abs(elements).max(axis=0) / np.float32(127)
        q = saturate(round_half_away(elements * inverse(d)), -128, 127)
        return assemble.q8_0(d, q)


def quantize_q8_1(x: F32) -> U8:
    """Q8_1: ``d f16 | s f16 | qs 32 x i8``, w = d * q; s is the sum of the codes (in f16) times d (in f16)."""
    with np.errstate(all="ignore"):
        elements = assemble.elements(x, QK)
        d = np.abs(elements).max(axis=0) / np.float32(127)
        q = saturate(round_half_away(elements * inverse(d)), -128, 127)
        return assemble.q8_1(d, q)


# ---------------------------------------------------------------------------------------------------------------------
# Super-blocks of 256
# ---------------------------------------------------------------------------------------------------------------------


def quantize_q2k(x: F32) -> U8:
    """Q2K: ``scales 16 | qs 64 | d f16 | dmin f16``, w = d * scale * q - dmin * min; scale and min are nibbles."""
    with np.errstate(all="ignore"):
        scale, minimum = search_scale_and_min(assemble.sub_blocks(x, 16), 3)
        scale_4bit, d = _quantize_q2k_scales(scale)
        min_4bit, dmin = _quantize_q2k_scales(minimum)
        scales = scale_4bit & 0xFF | (min_4bit & 0xF) << 4
        ls, lm = scales & 0xF, scales >> 4
        return assemble.q2k(d, dmin, ls, lm, codes_with_min(assemble.sub_blocks(x, 16), d, ls, dmin, lm, 3))


def quantize_q3k(x: F32) -> U8:
    """Q3K: ``hmask 32 | qs 64 | scales 12 | d f16``, w = d * (scale - 32) * (q - 4).

    A sub-block whose rounded ``d * (scale - 32)`` is zero gets the code 0, not 4.
    """
    with np.errstate(all="ignore"):
        elements = assemble.sub_blocks(x, 16)
        scale = search_q3_scale(elements).reshape(-1, 16).T
        largest = largest_magnitude(scale)
        empty = largest == 0
        iscale = np.float32(-32) / largest
        six_bit = np.where(empty, 0, np.clip(nearest_int(iscale * scale), -32, 31) + 32)
        d = np.where(empty, np.float32(0), np.float32(1) / iscale)
        step = widened_f16(d) * (np.where(empty, -32, six_bit - 32)).astype(np.float32)
        step = step.T.reshape(-1)
        q = np.where(step != 0, np.clip(nearest_int(elements / step), -4, 3) + 4, 0)
        return assemble.q3k(d, six_bit, whole_blocks(q))


def quantize_q4k(x: F32) -> U8:
    """Q4K: ``d f16 | dmin f16 | scales 12 | qs 128``, w = d * scale * q - dmin * min; scale and min have 6 bits."""
    with np.errstate(all="ignore"):
        return assemble.q4k(*_quantize_k4(x, 15))


def quantize_q5k(x: F32) -> U8:
    """Q5K: ``d f16 | dmin f16 | scales 12 | qh 32 | qs 128``, w = d * scale * q - dmin * min; as Q4K, 5-bit codes."""
    with np.errstate(all="ignore"):
        return assemble.q5k(*_quantize_k4(x, 31))


def quantize_q6k(x: F32) -> U8:
    """Q6K: ``ql 128 | qh 64 | scales 16 x i8 | d f16``, w = d * scale * (q - 32).

    A sub-block whose rounded ``d * scale`` is zero keeps the codes of its search (0 if all its elements are zero).
    """
    with np.errstate(all="ignore"):
        elements = assemble.sub_blocks(x, 16)
        scale, searched = search_q6_scale(elements)
        scale = scale.reshape(-1, 16).T
        iscale = np.float32(-128) / largest_magnitude(scale)
        d = np.float32(1) / iscale
        scales = np.minimum(nearest_int(iscale * scale), 127).astype(np.int8)
        step = (widened_f16(d) * scales.astype(np.float32)).T.reshape(-1)
        q = np.where(step == 0, searched, np.clip(nearest_int(elements / step), -32, 31) + 32)
        return assemble.q6k(d, scales, whole_blocks(q))


def quantize_q8k(x: F32, extreme: int = -128) -> U8:
    """Q8K: ``d f32 | qs 256 x i8 | bsums 16 x i16``, w = d * q; a bsum is the sum of 16 codes.

    Args:
        x: the blocks.
        extreme: the code of the element of largest magnitude: -128 in candle before 0.11 (mistral.rs 0.6, 0.8), -127
            since (mistral.rs 0.9). They also differ where the inverse scale overflows: 0 * inf is code 127 in the
            former, 0 in the latter.
    """
    if extreme not in (-128, -127):
        raise ValueError(f"the code of the element of largest magnitude: expected -128 or -127, got {extreme}")
    with np.errstate(all="ignore"):
        elements = assemble.elements(x, QK_K)
        largest = largest_magnitude(elements)
        iscale = np.float32(extreme) / largest
        scaled = round_half_away(iscale * elements)
        if extreme == -128:
            scaled = np.where(np.isnan(scaled), np.float32(127), scaled)
        q = np.where(largest == 0, 0, saturate(scaled, -128, 127))
        d = np.where(largest == 0, np.float32(0), np.float32(1) / iscale)
        return assemble.q8k(d, q)


# ---------------------------------------------------------------------------------------------------------------------
# Scales of the sub-blocks
# ---------------------------------------------------------------------------------------------------------------------


def _quantize_q2k_scales(values: F32) -> tuple[I32, F32]:
    """Scales (or mins) of 16 sub-blocks as multiples of 1/15 of the largest: ``int32 [16, blocks]`` and the unit."""
    values = values.reshape(-1, 16).T
    largest = at_least_zero_maximum(values)
    present = largest > 0
    multiples = np.where(present, nearest_int(np.float32(15) / largest * values), 0)
    return multiples & 0xFF, np.where(present, largest / np.float32(15), np.float32(0))


def _quantize_k4(x: F32, nmax: int) -> tuple[F32, F32, I32, I32, I32]:
    """The common part of Q4K and Q5K: d, dmin, scales and mins ``[8, blocks]``, the codes 0..nmax ``[256, blocks]``."""
    elements = assemble.sub_blocks(x, 32)
    scale, minimum = (values.reshape(-1, 8).T for values in search_scale_and_min(elements, nmax))
    largest_scale, largest_min = at_least_zero_maximum(scale), at_least_zero_maximum(minimum)
    inverse_scale = np.where(largest_scale > 0, np.float32(63) / largest_scale, np.float32(0))
    inverse_min = np.where(largest_min > 0, np.float32(63) / largest_min, np.float32(0))
    ls = np.minimum(nearest_int(inverse_scale * scale), 63) & 0xFF
    lm = np.minimum(nearest_int(inverse_min * minimum), 63) & 0xFF
    d, dmin = largest_scale / np.float32(63), largest_min / np.float32(63)
    return d, dmin, ls, lm, codes_with_min(elements, d, ls, dmin, lm, nmax)


def codes_with_min(x: F32, d: F32, scales: I32, dmin: F32, mins: I32, nmax: int) -> I32:
    """Final codes with the stored, rounded scales; code 0 where ``d * scale`` is zero. ``int32 [256, blocks]``."""
    step = (widened_f16(d) * scales.astype(np.float32)).T.reshape(-1)
    offset = (widened_f16(dmin) * mins.astype(np.float32)).T.reshape(-1)
    return whole_blocks(np.where(step == 0, 0, np.clip(nearest_int((x + offset) / step), 0, nmax)))


QUANTIZERS: dict[str, Callable[..., U8]] = {
    "Q4_0": quantize_q4_0,
    "Q4_1": quantize_q4_1,
    "Q5_0": quantize_q5_0,
    "Q5_1": quantize_q5_1,
    "Q8_0": quantize_q8_0,
    "Q8_1": quantize_q8_1,
    "Q2K": quantize_q2k,
    "Q3K": quantize_q3k,
    "Q4K": quantize_q4k,
    "Q5K": quantize_q5k,
    "Q6K": quantize_q6k,
    "Q8K": quantize_q8k,
}
