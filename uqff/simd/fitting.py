"""The searches of :mod:`uqff.numerics.fitting` in kernels, equal to it bit for bit.

A tile holds :data:`~uqff.simd.vectors.LANES` blocks transposed, an element of each in a vector, so that every lane
keeps the order of its sums.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from uqff.numerics.fitting import BF16, E4M3, E4M3_UNIT, F16, NEIGHBOURS, SINGULAR, TURNS, UNITS
from uqff.numerics.packing import e4m3_to_float32
from uqff.simd.bits import bf16_bits, bits_of, e4m3_code, f16_bits, f16_value, float_of
from uqff.simd.compiling import inline, kernel
from uqff.simd.load_store import load_f64, store_f64
from uqff.simd.masks import where
from uqff.simd.scratch import scratch
from uqff.simd.vectors import LANES, splat

__all__ = [
    "MOST",
    "affine_blocks",
    "affine_sums",
    "fit_affine",
    "fit_scale",
    "inverse",
    "inverses",
    "load_tile",
    "nearest",
    "scaled_blocks",
    "squared_errors",
    "stored",
]

MOST = 256
"""Elements of the largest block."""

_TILE = MOST * LANES

_E4M3 = e4m3_to_float32(np.arange(256, dtype=np.uint8))
_UNITS = np.array(UNITS)
_NEIGHBOURS = np.array(NEIGHBOURS)
_SHIFT = 1.5 * 2.0**52
"""Added and taken away again it rounds to whole numbers, ties to even: doubles there count in ones."""


@inline
def nearest(v, low, high):
    """Of lanes: see :func:`uqff.numerics.fitting.nearest_codes`."""
    v = where(v > low, v, splat(low))
    v = where(v < high, v, splat(high))
    return (v + _SHIFT) - _SHIFT


@inline
def nearest_one(v, low, high):
    """:func:`nearest` of one number."""
    v = v if v > low else low
    v = v if v < high else high
    return (v + _SHIFT) - _SHIFT


@inline
def inverses(d):
    """Of lanes: 1 / d, 0 where d is 0."""
    return where(d != 0.0, splat(1.0) / d, splat(0.0))


@inline
def inverse(d):
    """1 / d, 0 where d is 0."""
    return 1.0 / d if d != 0.0 else 0.0


@inline
def stored(value, form):
    """See :func:`uqff.numerics.fitting.stored`."""
    single = np.float32(value)
    if form == F16:
        return f16_value(f16_bits(single))
    if form == BF16:
        return float_of(bf16_bits(bits_of(single)))
    if form == E4M3:
        return np.float32(_E4M3[e4m3_code(bits_of(np.float32(single * E4M3_UNIT)))] / E4M3_UNIT)
    return single


@inline
def load_tile(x, w, block, blocks, size, tx, tw):
    """A tile of blocks and their weights; lanes after the last block are zero."""
    for lane in range(LANES):
        if lane < blocks:
            for i in range(size):
                tx[i * LANES + lane] = np.float64(x[block + lane, i])
                tw[i * LANES + lane] = np.float64(w[block + lane, i])
        else:
            for i in range(size):
                tx[i * LANES + lane] = 0.0
                tw[i * LANES + lane] = 0.0


@inline
def fit_scale(tx, tw, size, low, high, starts):
    """See :func:`uqff.numerics.fitting.fit_scale`, per lane."""
    none = splat(0.0)
    peak, best, scale = none, none, none
    for i in range(size):
        v = load_f64(tx, i * LANES)
        peak = where(v > peak, v, peak)
        v = none - v
        peak = where(v > peak, v, peak)
    peak = inverses(peak)
    for turn in range(starts.size + TURNS):
        factor = peak * starts[turn] if turn < starts.size else inverses(scale)
        products, squares = none, none
        for i in range(size):
            v, u = load_f64(tx, i * LANES), load_f64(tw, i * LANES)
            q = nearest(v * factor, low, high)
            products = products + u * v * q
            squares = squares + u * q * q
        inverted = inverses(squares)
        explained = products * products * inverted
        better = explained > best
        best = where(better, explained, best)
        scale = where(better, products * inverted, scale)
    return scale


@inline
def affine_sums(tx, tw, size, top, factor, zero):
    """Weighted sums of codes, of their squares and of their products with the weights, per lane."""
    codes, squares, products = splat(0.0), splat(0.0), splat(0.0)
    for i in range(size):
        v, u = load_f64(tx, i * LANES), load_f64(tw, i * LANES)
        q = nearest((v - zero) * factor, 0.0, top)
        uq = u * q
        codes = codes + uq
        squares = squares + uq * q
        products = products + u * v * q
    return codes, squares, products


@inline
def fit_affine(tx, tw, size, top, starts, free):
    """See :func:`uqff.numerics.fitting.fit_affine`, per lane."""
    none = splat(0.0)
    first = load_f64(tx, 0)
    least, most = (first, first) if free else (none, none)
    sum_w, sum_x = none, none
    for i in range(size):
        v, u = load_f64(tx, i * LANES), load_f64(tw, i * LANES)
        least, most = where(v < least, v, least), where(v > most, v, most)
        sum_w = sum_w + u
        sum_x = sum_x + u * v
    span = most - least
    scale, offset = none, sum_x * inverses(sum_w)
    if not free:
        offset = where(offset < 0.0, offset, none)
    best = offset * (sum_x * 2.0 - offset * sum_w)
    for turn in range(starts.shape[0] + TURNS):
        if turn < starts.shape[0]:
            factor = inverses(span * (1.0 - starts[turn, 0] - starts[turn, 1])) * top
            zero = least + span * starts[turn, 0]
        else:
            factor, zero = inverses(scale), offset
        codes, squares, products = affine_sums(tx, tw, size, top, factor, zero)
        determinant = sum_w * squares - codes * codes
        regular = determinant > sum_w * squares * SINGULAR
        inverted = inverses(determinant)
        s = (sum_w * products - sum_x * codes) * inverted
        b = (squares * sum_x - codes * products) * inverted
        if not free:
            inside = regular & (b <= 0.0)
            s, b = where(inside, s, products * inverses(squares)), where(inside, b, none)
            regular = squares > 0.0
        explained = s * (products * 2.0 - s * squares - (b * codes) * 2.0) + b * (sum_x * 2.0 - b * sum_w)
        better = regular & (s > 0.0) & (explained > best)
        best = where(better, explained, best)
        scale, offset = where(better, s, scale), where(better, b, offset)
    return scale, offset


@inline
def neighbour(scale, k, form, single, wide):
    """Neighbour k of the scales as a reader sees it: put into ``single``; and as lanes, by way of ``wide``."""
    store_f64(wide, 0, scale)
    for lane in range(LANES):
        single[lane] = stored(wide[lane] * (1.0 + _NEIGHBOURS[k] * _UNITS[form]), form)
        wide[lane] = np.float64(single[lane])
    return load_f64(wide, 0)


@kernel
def scaled_blocks(x, w, low, high, starts, form, scales, codes, lo, hi):
    """:func:`uqff.numerics.fitting.quantize_scaled` of blocks [lo, hi).

    Args:
        x: float32 ``[n, size]``, ``size`` at most :data:`MOST`.
        w: like ``x``.
        low: the least code, a float.
        high: the largest, a float.
        starts: float64.
        form: of the scale.
        scales: float32 ``[n]``, to be written.
        codes: int8 ``[n, size]``, to be written.
        lo: the first block.
        hi: after the last.
    """
    size = x.shape[1]
    tx, tw = scratch(_TILE, np.float64), scratch(_TILE, np.float64)
    wide, best = scratch(LANES, np.float64), scratch(LANES, np.float64)
    single, chosen = scratch(LANES, np.float32), scratch(LANES, np.float32)
    tried = len(NEIGHBOURS) if _UNITS[form] != 0.0 else 1
    for first in range(lo, hi, LANES):
        blocks = min(LANES, hi - first)
        load_tile(x, w, first, blocks, size, tx, tw)
        scale = fit_scale(tx, tw, size, low, high, starts)
        for k in range(tried):
            step = neighbour(scale, k, form, single, wide)
            factor, error = inverses(step), splat(0.0)
            for i in range(size):
                v = load_f64(tx, i * LANES)
                e = v - nearest(v * factor, low, high) * step
                error = error + load_f64(tw, i * LANES) * e * e
            store_f64(wide, 0, error)
            for lane in range(LANES):
                if k == 0 or wide[lane] < best[lane]:
                    best[lane] = wide[lane] if wide[lane] == wide[lane] else np.inf
                    chosen[lane] = single[lane]
        for lane in range(blocks):
            scales[first + lane] = chosen[lane]
            f = inverse(np.float64(chosen[lane]))
            for i in range(size):
                codes[first + lane, i] = np.int8(nearest_one(tx[i * LANES + lane] * f, low, high))


@kernel
def affine_blocks(x, w, top, starts, form, scales, offsets, codes, lo, hi):
    """:func:`uqff.numerics.fitting.quantize_affine` of blocks [lo, hi); see :func:`scaled_blocks`, codes are uint8."""
    size = x.shape[1]
    tx, tw = scratch(_TILE, np.float64), scratch(_TILE, np.float64)
    wide, best = scratch(LANES, np.float64), scratch(LANES, np.float64)
    single, chosen = scratch(LANES, np.float32), scratch(LANES, np.float32)
    rounded, zeros = scratch(LANES, np.float32), scratch(LANES, np.float32)
    tried = len(NEIGHBOURS) if _UNITS[form] != 0.0 else 1
    for first in range(lo, hi, LANES):
        blocks = min(LANES, hi - first)
        load_tile(x, w, first, blocks, size, tx, tw)
        scale, offset = fit_affine(tx, tw, size, top, starts, True)
        sum_w, sum_x = splat(0.0), splat(0.0)
        for i in range(size):
            v, u = load_f64(tx, i * LANES), load_f64(tw, i * LANES)
            sum_w = sum_w + u
            sum_x = sum_x + u * v
        for k in range(tried):
            step = neighbour(scale, k, form, single, wide)
            factor, sum_q = inverses(step), splat(0.0)
            for i in range(size):
                q = nearest((load_f64(tx, i * LANES) - offset) * factor, 0.0, top)
                sum_q = sum_q + load_f64(tw, i * LANES) * q
            store_f64(wide, 0, (sum_x - step * sum_q) * inverses(sum_w))
            for lane in range(LANES):
                rounded[lane] = stored(wide[lane], form)
                wide[lane] = np.float64(rounded[lane])
            base, error = load_f64(wide, 0), splat(0.0)
            for i in range(size):
                v = load_f64(tx, i * LANES)
                e = v - (nearest((v - base) * factor, 0.0, top) * step + base)
                error = error + load_f64(tw, i * LANES) * e * e
            store_f64(wide, 0, error)
            for lane in range(LANES):
                if k == 0 or wide[lane] < best[lane]:
                    best[lane] = wide[lane] if wide[lane] == wide[lane] else np.inf
                    chosen[lane] = single[lane]
                    zeros[lane] = rounded[lane]
        for lane in range(blocks):
            scales[first + lane] = chosen[lane]
            offsets[first + lane] = zeros[lane]
            f, b = inverse(np.float64(chosen[lane])), np.float64(zeros[lane])
            for i in range(size):
                codes[first + lane, i] = np.uint8(nearest_one((tx[i * LANES + lane] - b) * f, 0.0, top))


@kernel
def squared_errors(x, w, y, errors, lo, hi):
    """:func:`uqff.families.best.squared_errors` of blocks [lo, hi): float32 ``[n, size]``, to float64 ``[n]``."""
    for block in range(lo, hi):
        error = 0.0
        for i in range(x.shape[1]):
            e = np.float64(x[block, i]) - np.float64(y[block, i])
            error += np.float64(w[block, i]) * e * e
        errors[block] = error
