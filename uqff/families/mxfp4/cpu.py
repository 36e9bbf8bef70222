"""MXFP4 on the CPU: bit-equal twins of :mod:`uqff.families.mxfp4.reference`. The items are blocks."""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.mxfp4.reference import BIAS, BLOCK_SIZE, E2M1, EXPONENTS, THRESHOLDS, floor_log2
from uqff.simd.bits import MAGNITUDE, bits_of, float_of, pack8
from uqff.simd.compiling import inline, kernel
from uqff.simd.decoding import Decoder, Decoding
from uqff.simd.fitting import load_tile
from uqff.simd.load_store import load_codes_4, load_f64, load_u8, store_f32, store_f64
from uqff.simd.masks import where
from uqff.simd.output import Bytes, looked_up, put_pair, read_ahead, without_subnormals
from uqff.simd.planes import HAS_AVX2, PAIRS, byte_planes, load_pieces, look_up_bytes, spread
from uqff.simd.scratch import scratch
from uqff.simd.threads import run_ranges
from uqff.simd.vectors import LANES, as_f32, multiply_add, splat, total, where_less

if TYPE_CHECKING:
    from uqff.families.mxfp4.tensor import MXFP4

__all__ = ["decoding", "dequantize", "quantize", "search"]

BYTES = BLOCK_SIZE // 2
"""Of the nibbles of a block."""


def dequantize(weight: MXFP4, out: Bytes, form: int) -> bool:
    """See :meth:`QuantizedTensor._dequantize_by_kernel`."""
    blocks = decoding(weight)
    if blocks is None:
        return False
    blocks.dequantize(out, form)
    return True


def decoding(weight: MXFP4) -> Decoding | None:
    """See :meth:`QuantizedTensor.decoding`."""
    blocks, scales = weight.parts["blocks"].array(), weight.parts["scales"].array()
    return Decoding(_mxfp4, (blocks, scales), len(scales), BLOCK_SIZE) if len(blocks) == BYTES * len(scales) else None


@looked_up
def _weights(codes: Any, scale: Any) -> Any:
    """Of nibbles ``s e e m``, what is above them left out: 0 and 1/2 for ``e = 0``, else ``(1 + m/2) * 2**(e - 1)``.

    ``e e m`` above 1 are float32's low exponent bits and high mantissa bit, 126 to be added to the exponent.
    """
    magnitude = codes & 7
    subnormal = where_less(magnitude, 1, splat(0), splat(126 << 23))
    value = where_less(magnitude, 2, subnormal, (magnitude << 22) + (126 << 23))
    return as_f32(value | (codes & 8) << 28) * scale


@Decoder
def _mxfp4(parts, out, form, lo, hi):
    blocks, scales = parts
    for block in range(lo, hi):
        read_ahead(blocks, BYTES * block)
        # No e2m1 number but zero is below 1/2: it takes a scale of 2**-126 to make a subnormal number.
        to = without_subnormals(form, scales[block] != 1)
        scale = float_of(np.uint32(scales[block]) << np.uint32(23))
        a, b = load_codes_4(blocks, BYTES * block)
        put_pair(out, BLOCK_SIZE * block, to, _weights(a, scale), _weights(b, scale))


TWICE = (2 * np.asarray(E2M1, np.float32)).astype(np.int8)
"""By their codes, twice the numbers: integers."""

STRIP = 512
"""Blocks whose scales are read together."""


@inline
def _read_scales(scales, first, count, strip):
    if count < LANES:
        for i in range(count):
            strip[i] = float_of(np.uint32(scales[first + i]) << np.uint32(23))
        return
    for i in range(0, count, LANES):
        at = min(i, count - LANES)
        store_f32(strip, at, as_f32(load_u8(scales, first + at) << 23))


def _mxfp4_row(parts, x, lo, hi):
    blocks, scales = parts
    strip, sums = scratch(STRIP, np.float32), splat(np.float32(0))
    for begin in range(lo, hi, STRIP):
        count = min(STRIP, hi - begin)
        _read_scales(scales, begin, count, strip)
        for to in range(0, count, 4):
            block = min(to, count - 4)
            at = BYTES * (begin + block)
            read_ahead(blocks, at)
            words, i = load_pieces(blocks, at, 0, 1), BLOCK_SIZE * (begin + to - lo)
            found = byte_planes(look_up_bytes(words & 0x0F0F0F0F, TWICE), x, i)
            found = found + byte_planes(look_up_bytes(words >> 4 & 0x0F0F0F0F, TWICE), x, i + 64)
            sums = multiply_add(found, spread(strip, block, 4), sums)
    return total(sums) * np.float32(2.0**-25)


if HAS_AVX2:
    _mxfp4.by_row(PAIRS, few=3)(_mxfp4_row)


F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]
U32: TypeAlias = npt.NDArray[np.uint32]

PAIR = 2 * BLOCK_SIZE
"""Blocks are taken in pairs: a loop over 64 elements vectorises, one over 32 is unrolled into scalar code instead."""

GRAIN = 4096
"""Pairs of a range at least."""


def quantize(w: F32, threads: int | None = None) -> tuple[U8, U8]:
    """See :func:`uqff.families.mxfp4.reference.quantize`; ``w`` must be C-contiguous."""
    flat = w.reshape(-1)
    blocks = flat.size // BLOCK_SIZE
    codes = np.empty((blocks, BLOCK_SIZE // 2), np.uint8)
    scales = np.empty(blocks, np.uint8)
    first = first_of_next()
    run_ranges(
        lambda lo, hi: quantize_pairs(flat, first, codes.reshape(-1), scales, lo, hi),
        blocks // 2,
        grain=GRAIN,
        threads=threads,
    )
    if blocks % 2:
        last = np.concatenate([flat[-BLOCK_SIZE:], np.zeros(BLOCK_SIZE, np.float32)])
        last_codes, last_scales = np.empty(BLOCK_SIZE, np.uint8), np.empty(2, np.uint8)
        quantize_pairs(last, first, last_codes, last_scales, 0, 1)
        codes[-1], scales[-1] = last_codes[: BLOCK_SIZE // 2], last_scales[0]
    rows, columns = w.shape[:-1], w.shape[-1]
    return codes.reshape(*rows, columns // 2), scales.reshape(*rows, columns // BLOCK_SIZE)


@cache
def first_of_next() -> U32:
    """Per exponent field of ``absmax / 6``, the bits from which on its logarithm rounds up to the next integer.

    uint32 ``[256]``, found by asking the reference about the last 64 values of each binade (44 round up at most); the
    start of the next binade where none does. The subnormals count as one binade, with field 0.
    """
    ends = np.arange(1, 255, dtype=np.uint32) << np.uint32(23)
    last = ends[:, None] - np.arange(64, 0, -1, dtype=np.uint32)
    rounded_up = floor_log2(last.view(np.float32)) == np.arange(1, 255)[:, None] - BIAS
    first = np.zeros(256, np.uint32)
    first[:254] = ends - rounded_up.sum(-1, dtype=np.uint32)
    return first


@kernel
def quantize_pairs(w, first, codes, scales, lo, hi):
    """Pairs of blocks [lo, hi) of the flattened weight; ``first`` from :func:`first_of_next`."""
    nibbles = scratch(PAIR, np.uint8)
    nibbles8 = nibbles.view(np.uint64)
    words = codes.view(np.uint32)
    for p in range(lo, hi):
        pair = w[p * PAIR : (p + 1) * PAIR]
        run = words[p * (PAIR // 8) : (p + 1) * (PAIR // 8)]
        peak0, peak1 = np.uint32(0), np.uint32(0)
        for i in range(PAIR):
            magnitude = bits_of(pair[i]) & MAGNITUDE
            peak0 = max(peak0, magnitude if i < BLOCK_SIZE else np.uint32(0))
            peak1 = max(peak1, magnitude if i >= BLOCK_SIZE else np.uint32(0))
        scale0, scale1 = scale_of(peak0, first), scale_of(peak1, first)
        scales[2 * p], scales[2 * p + 1] = np.uint8(scale0), np.uint8(scale1)
        inverse0 = float_of((np.uint32(2 * BIAS) - scale0) << np.uint32(23))
        inverse1 = float_of((np.uint32(2 * BIAS) - scale1) << np.uint32(23))
        for i in range(PAIR):
            x = pair[i] * (inverse0 if i < BLOCK_SIZE else inverse1)
            a = abs(x)
            code = np.int32(a >= np.float32(0.25)) + np.int32(a >= np.float32(0.75))
            code += np.int32(a >= np.float32(1.25)) + np.int32(a >= np.float32(1.75))
            code += np.int32(a >= np.float32(2.5)) + np.int32(a >= np.float32(3.5)) + np.int32(a >= np.float32(5))
            nibbles[i] = np.uint8(code + np.int32(8) * np.int32(x < np.float32(0)))
        for k in range(PAIR // 8):
            run[k] = np.uint32(pack8(nibbles8[k], 4))


@inline
def scale_of(peak, first):
    """The scale byte, as uint32, of a block whose largest magnitude has the bits ``peak``; 252 at most."""
    sixth = bits_of(float_of(peak) / np.float32(6))
    field = sixth >> np.uint32(23)
    return np.uint32(BIAS) if peak == np.uint32(0) else field + np.uint32(sixth >= first[field])


POWERS = np.ldexp(1.0, np.arange(256) - BIAS)
"""Of each scale byte."""

TILE = BLOCK_SIZE * LANES
"""Weights of the blocks that are searched together."""

_EXPONENTS = np.array(EXPONENTS)
_VALUES = np.array(E2M1[:8])
_THRESHOLDS = THRESHOLDS.astype(np.float64)


def search(w: F32, importance: F32) -> tuple[U8, U8]:
    """See :func:`uqff.families.mxfp4.reference.search`; both arrays must be C-contiguous."""
    codes, scales = np.empty((len(w), BYTES), np.uint8), np.empty((len(w), 1), np.uint8)
    first = first_of_next()
    run_ranges(lambda lo, hi: search_blocks(w, importance, first, codes, scales, lo, hi), len(w), grain=256)
    return codes, scales


@kernel
def search_blocks(w, importance, first_bits, codes, scales, lo, hi):
    """Blocks [lo, hi)."""
    tx, tw = scratch(TILE, np.float64), scratch(TILE, np.float64)
    up, down, best = scratch(LANES, np.float64), scratch(LANES, np.float64), scratch(LANES, np.float64)
    start, tried, chosen = scratch(LANES, np.int64), scratch(LANES, np.int64), scratch(LANES, np.int64)
    for first in range(lo, hi, LANES):
        blocks = min(LANES, hi - first)
        load_tile(w, importance, first, blocks, BLOCK_SIZE, tx, tw)
        for lane in range(LANES):
            peak = np.uint32(0)
            for i in range(BLOCK_SIZE):
                tx[i * LANES + lane] = abs(tx[i * LANES + lane])
                peak = max(peak, bits_of(np.float32(tx[i * LANES + lane])))
            start[lane] = np.int64(scale_of(peak, first_bits))
            chosen[lane] = start[lane]
            best[lane] = np.inf
        for k in range(len(EXPONENTS)):
            for lane in range(LANES):
                tried[lane] = min(max(start[lane] + _EXPONENTS[k], 1), 254)
                up[lane], down[lane] = POWERS[2 * BIAS - tried[lane]], POWERS[tried[lane]]
            factor, unit, error = load_f64(up, 0), load_f64(down, 0), splat(0.0)
            for i in range(BLOCK_SIZE):
                v = load_f64(tx, i * LANES) * factor
                value = splat(0.0)
                for c in range(7):
                    value = where(v < _THRESHOLDS[c], value, splat(_VALUES[c + 1]))
                e = (v - value) * unit
                error = error + load_f64(tw, i * LANES) * e * e
            store_f64(up, 0, error)
            for lane in range(LANES):
                if up[lane] < best[lane]:
                    best[lane] = up[lane]
                    chosen[lane] = tried[lane]
        for lane in range(blocks):
            scales[first + lane, 0] = np.uint8(chosen[lane])
            factor_of_one = POWERS[2 * BIAS - chosen[lane]]
            for j in range(BYTES):
                byte = 0
                for half in range(2):
                    i = 2 * j + half
                    v = tx[i * LANES + lane] * factor_of_one
                    code = 0
                    for c in range(7):
                        code += v >= _THRESHOLDS[c]
                    code += 8 * (w[first + lane, i] < np.float32(0))
                    byte |= code << (4 * half)
                codes[first + lane, j] = np.uint8(byte)
