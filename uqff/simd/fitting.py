"""The searches of :mod:`uqff.numerics.fitting` in kernels, equal to it bit for bit.

A tile holds :data:`~uqff.simd.vectors.LANES` blocks transposed, an element of each in a vector, so that every lane
keeps the order of its sums.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from uqff.numerics.fitting import (
    BF16,
    CANDIDATES,
    E4M3,
    E4M3_UNIT,
    F16,
    NEIGHBOURS,
    SINGULAR,
    SINGULAR_32,
    STEPS,
    TURNS,
    UNITS,
)
from uqff.numerics.packing import e4m3_to_float32
from uqff.simd.bits import bf16_bits, bits_of, e4m3_code, f16_bits, f16_value, float_of
from uqff.simd.compiling import inline, kernel
from uqff.simd.load_store import load_f32, load_f64, store_f32, store_f64
from uqff.simd.masks import where
from uqff.simd.scratch import scratch
from uqff.simd.vectors import LANES, narrow, splat, wide

__all__ = [
    "MOST",
    "affine_blocks",
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
_KEPT = 3 * CANDIDATES * LANES

_E4M3 = e4m3_to_float32(np.arange(256, dtype=np.uint8))
_UNITS = np.array(UNITS)
_NEIGHBOURS = np.array(NEIGHBOURS)
_SHIFT_32 = np.float32(1.5 * 2.0**23)
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
def singles(ty, tu, tx, tw, size, least, unit, weight):
    """A tile in float32: numbers from 0 to 1, weights to 1 at most; the sum of these."""
    sum_u = splat(np.float32(0))
    for i in range(size):
        u = narrow(load_f64(tw, i * LANES) * weight)
        store_f32(ty, i * LANES, narrow((load_f64(tx, i * LANES) - least) * unit))
        store_f32(tu, i * LANES, u)
        sum_u = sum_u + u
    return sum_u


@inline
def inverses_32(d):
    """:func:`inverses` in float32."""
    return where(d != np.float32(0), splat(np.float32(1)) / d, splat(np.float32(0)))


@inline
def step(ty, tu, size, top, sum_u, ceiling, free, factor, zero):
    """See :meth:`uqff.numerics.fitting.Single.step`, per lane."""
    none = splat(np.float32(0))
    rests, codes, rests2, products, squares = none, none, none, none, none
    high = splat(np.float32(top))
    for i in range(size):
        v, u = (load_f32(ty, i * LANES) - zero) * factor, load_f32(tu, i * LANES)
        q = where(v > none, v, none)
        q = where(q < high, q, high)
        q = (q + _SHIFT_32) - _SHIFT_32
        r = v - q
        ur, uq = u * r, u * q
        rests = rests + ur
        codes = codes + uq
        rests2 = rests2 + ur * r
        products = products + ur * q
        squares = squares + uq * q
    determinant = sum_u * squares - codes * codes
    regular = determinant > sum_u * squares * SINGULAR_32
    inverted = inverses_32(determinant)
    grow = (sum_u * products - rests * codes) * inverted
    shift = (squares * rests - products * codes) * inverted
    if not free:
        most = (ceiling - zero) * factor
        inside = regular & (shift <= most)
        grow = where(inside, grow, (products - most * codes) * inverses_32(squares))
        shift = where(inside, shift, most)
        regular = squares > none
    two = np.float32(2)
    error = rests2 + grow * (grow * squares - products * two) + shift * (shift * sum_u - rests * two)
    error = error + grow * shift * two * codes
    one = inverses_32(factor)
    scale = (grow + np.float32(1)) * one
    error = where(regular & (scale > none), error * one * one, splat(np.float32(np.inf)))
    return error, scale, zero + shift * one


@inline
def keep_candidate(kept, error, scale, offset):
    """Put a start among the best so far, which are in the order of their errors."""
    for k in range(CANDIDATES):
        at = 3 * k * LANES
        e, s, z = load_f32(kept, at), load_f32(kept, at + LANES), load_f32(kept, at + 2 * LANES)
        better = error < e
        store_f32(kept, at, where(better, error, e))
        store_f32(kept, at + LANES, where(better, scale, s))
        store_f32(kept, at + 2 * LANES, where(better, offset, z))
        error, scale, offset = where(better, e, error), where(better, s, scale), where(better, z, offset)


@inline
def fit_affine(tx, tw, size, top, starts, free):
    """See :func:`uqff.numerics.fitting.fit_affine`, per lane."""
    none = splat(0.0)
    first = load_f64(tx, 0)
    least, most = (first, first) if free else (none, none)
    heaviest, sum_w, sum_x = none, none, none
    for i in range(size):
        v, u = load_f64(tx, i * LANES), load_f64(tw, i * LANES)
        least, most = where(v < least, v, least), where(v > most, v, most)
        heaviest = where(u > heaviest, u, heaviest)
        sum_w = sum_w + u
        sum_x = sum_x + u * v
    span = most - least
    unit = inverses(span)
    ty, tu = scratch(_TILE, np.float32), scratch(_TILE, np.float32)
    sum_u = singles(ty, tu, tx, tw, size, least, unit, inverses(heaviest))
    ceiling = narrow((none - least) * unit)
    kept = scratch(_KEPT, np.float32)
    for k in range(CANDIDATES):
        store_f32(kept, 3 * k * LANES, splat(np.float32(np.inf)))
        store_f32(kept, (3 * k + 1) * LANES, splat(np.float32(0)))
        store_f32(kept, (3 * k + 2) * LANES, splat(np.float32(0)))
    for turn in range(starts.shape[0]):
        a, b = starts[turn, 0], starts[turn, 1]
        factor, zero = splat(np.float32(top / (1.0 - a - b))), splat(np.float32(a))
        error, s, z = step(ty, tu, size, top, sum_u, ceiling, free, factor, zero)
        keep_candidate(kept, error, s, z)
    best, scale, offset = load_f32(kept, 0), load_f32(kept, LANES), load_f32(kept, 2 * LANES)
    s, z = scale, offset
    for turn in range(CANDIDATES * STEPS):
        if turn % STEPS == 0:
            at = 3 * (turn // STEPS) * LANES
            s, z = load_f32(kept, at + LANES), load_f32(kept, at + 2 * LANES)
        error, s, z = step(ty, tu, size, top, sum_u, ceiling, free, inverses_32(s), z)
        better = error < best
        best = where(better, error, best)
        scale, offset = where(better, s, scale), where(better, z, offset)
    inverted, base = inverses(wide(scale) * span), least + wide(offset) * span
    codes, squares, products = none, none, none
    for i in range(size):
        v, u = load_f64(tx, i * LANES), load_f64(tw, i * LANES)
        q = nearest((v - base) * inverted, 0.0, top)
        uq = u * q
        codes = codes + uq
        squares = squares + uq * q
        products = products + u * v * q
    determinant = sum_w * squares - codes * codes
    regular = determinant > sum_w * squares * SINGULAR
    inverted = inverses(determinant)
    d, m = (sum_w * products - sum_x * codes) * inverted, (squares * sum_x - codes * products) * inverted
    flat = sum_x * inverses(sum_w)
    if not free:
        inside = regular & (m <= 0.0)
        d, m = where(inside, d, products * inverses(squares)), where(inside, m, none)
        regular = squares > 0.0
        flat = where(flat < 0.0, flat, none)
    explained = d * (products * 2.0 - d * squares - (m * codes) * 2.0) + m * (sum_x * 2.0 - m * sum_w)
    better = regular & (d > 0.0) & (explained > flat * (sum_x * 2.0 - flat * sum_w))
    return where(better, d, none), where(better, m, flat)


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
def squared_errors(x, w, y, z, of_y, of_z, lo, hi):
    """:func:`uqff.families.best.squared_errors` of blocks [lo, hi): float32 ``[n, size]``, to float64 ``[n]``.

    Both of two blocks at once, as each sum waits for itself.
    """
    for block in range(lo, hi, 2):
        other = min(block + 1, hi - 1)
        y0, z0, y1, z1 = 0.0, 0.0, 0.0, 0.0
        for i in range(x.shape[1]):
            v, u = np.float64(x[block, i]), np.float64(w[block, i])
            e, f = v - np.float64(y[block, i]), v - np.float64(z[block, i])
            y0 += u * e * e
            z0 += u * f * f
            v, u = np.float64(x[other, i]), np.float64(w[other, i])
            e, f = v - np.float64(y[other, i]), v - np.float64(z[other, i])
            y1 += u * e * e
            z1 += u * f * f
        of_y[block], of_z[block] = y0, z0
        of_y[other], of_z[other] = y1, z1
