"""The searches of the K types in :mod:`uqff.families.gguf.reference_best` as kernels, equal to them bit for bit.

A tile holds the sub-blocks of one super-block or of two, one in every lane.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from uqff.families.gguf.reference_best import NEAR, ROUNDS
from uqff.numerics.fitting import F16, SINGULAR, TURNS
from uqff.simd.compiling import inline, kernel
from uqff.simd.fitting import (
    fit_affine,
    fit_scale,
    inverse,
    inverses,
    load_tile,
    nearest,
    nearest_one,
    stored,
)
from uqff.simd.load_store import load_f64, store_f64
from uqff.simd.masks import where
from uqff.simd.scratch import scratch
from uqff.simd.vectors import LANES, splat

__all__ = ["affine_super_blocks", "scaled_super_blocks"]

LARGEST = 32
"""Weights of the largest sub-block."""

TILE = LARGEST * LANES

_NEAR = NEAR


@inline
def fit_one_scale(values, weights, at, count, low, high, starts):
    """:func:`uqff.numerics.fitting.fit_scale` of ``values[at:at + count]``."""
    peak, best, scale = 0.0, 0.0, 0.0
    for i in range(at, at + count):
        peak = max(peak, abs(values[i]))
    peak = inverse(peak)
    for turn in range(starts.size + TURNS):
        factor = starts[turn] * peak if turn < starts.size else inverse(scale)
        products, squares = 0.0, 0.0
        for i in range(at, at + count):
            q = nearest_one(values[i] * factor, low, high)
            products += weights[i] * values[i] * q
            squares += weights[i] * q * q
        inverted = inverse(squares)
        explained = products * products * inverted
        if explained > best:
            best = explained
            scale = products * inverted
    return scale


@inline
def clipped(v, low, high):
    v = where(v > low, v, splat(low))
    return where(v < high, v, splat(high))


@inline
def group_sum(values, at, count):
    total = 0.0
    for i in range(at, at + count):
        total += values[i]
    return total


@inline
def spread(values, at, count, value):
    for i in range(at, at + count):
        values[i] = value


@kernel
def affine_super_blocks(x, w, top, limit, starts, units, d, dmin, ls, lm, codes, lo, hi):
    """``search_k_affine`` of super-blocks [lo, hi).

    Args:
        x: sub-blocks, float32 ``[n * per_block, size]``.
        w: like ``x``.
        top: the largest code, a float.
        limit: the largest scale and minimum, a float.
        starts: of sub-blocks.
        units: starts of the units.
        d: float32 ``[n]``, to be written, and so are the others.
        dmin: float32 ``[n]``.
        ls: scales, uint8 ``[n * per_block]``.
        lm: minimums, likewise.
        codes: uint8, like ``x``.
        lo: the first super-block.
        hi: after the last.
    """
    size = x.shape[1]
    per_block = 256 // size
    tx, tw = scratch(TILE, np.float64), scratch(TILE, np.float64)
    one, two, three = scratch(LANES, np.float64), scratch(LANES, np.float64), scratch(LANES, np.float64)
    four, five = scratch(LANES, np.float64), scratch(LANES, np.float64)
    unit, least, best = scratch(LANES, np.float64), scratch(LANES, np.float64), scratch(LANES, np.float64)
    kept_unit, kept_least = scratch(LANES, np.float64), scratch(LANES, np.float64)
    kept_ls, kept_lm = scratch(LANES, np.float64), scratch(LANES, np.float64)
    for first in range(lo * per_block, hi * per_block, LANES):
        blocks = min(LANES, hi * per_block - first)
        load_tile(x, w, first, blocks, size, tx, tw)
        scale, offset = fit_affine(tx, tw, size, top, starts, False)
        minimum = splat(0.0) - offset
        factor = inverses(scale)
        squares, sum_w, sum_x = splat(0.0), splat(0.0), splat(0.0)
        for i in range(size):
            v, u = load_f64(tx, i * LANES), load_f64(tw, i * LANES)
            q = nearest((v + minimum) * factor, 0.0, top)
            squares = squares + u * q * q
            sum_w = sum_w + u
            sum_x = sum_x + u * v
        store_f64(one, 0, scale)
        store_f64(two, 0, squares)
        store_f64(three, 0, minimum)
        store_f64(four, 0, sum_w)
        for at in range(0, LANES, per_block):
            spread(best, at, per_block, np.inf)
            fitted = stored(fit_one_scale(one, two, at, per_block, 0.0, limit, units), F16)
            spread(unit, at, per_block, np.float64(fitted))
            fitted = stored(fit_one_scale(three, four, at, per_block, 0.0, limit, units), F16)
            spread(least, at, per_block, np.float64(fitted))
        vls = nearest(scale * inverses(load_f64(unit, 0)), 0.0, limit)
        vlm = nearest(minimum * inverses(load_f64(least, 0)), 0.0, limit)
        for turn in range(ROUNDS):
            around_ls, around_lm = vls, vlm
            vunit, vleast = load_f64(unit, 0), load_f64(least, 0)
            error = splat(np.inf)
            for more in range(_NEAR.size):
                for less in range(_NEAR.size):
                    try_ls = clipped(around_ls + _NEAR[more], 0.0, limit)
                    try_lm = clipped(around_lm + _NEAR[less], 0.0, limit)
                    step, minimum, found = vunit * try_ls, vleast * try_lm, splat(0.0)
                    factor = inverses(step)
                    for i in range(size):
                        v = load_f64(tx, i * LANES)
                        e = v - (nearest((v + minimum) * factor, 0.0, top) * step - minimum)
                        found = found + load_f64(tw, i * LANES) * e * e
                    better = found < error
                    error = where(better, found, error)
                    vls, vlm = where(better, try_ls, vls), where(better, try_lm, vlm)
            store_f64(one, 0, error)
            store_f64(two, 0, vls)
            store_f64(three, 0, vlm)
            for at in range(0, LANES, per_block):
                total = group_sum(one, at, per_block)
                if turn == 0 or total < best[at]:
                    best[at] = total if total == total else np.inf
                    for i in range(at, at + per_block):
                        kept_unit[i], kept_least[i] = unit[i], least[i]
                        kept_ls[i], kept_lm[i] = two[i], three[i]
            if turn + 1 < ROUNDS:
                step, minimum = vunit * vls, vleast * vlm
                factor = inverses(step)
                sum_q, squares, products = splat(0.0), splat(0.0), splat(0.0)
                for i in range(size):
                    v, u = load_f64(tx, i * LANES), load_f64(tw, i * LANES)
                    q = nearest((v + minimum) * factor, 0.0, top)
                    uq = u * q
                    sum_q = sum_q + uq
                    squares = squares + uq * q
                    products = products + u * v * q
                store_f64(one, 0, vls * vls * squares)
                store_f64(two, 0, vls * vlm * sum_q)
                store_f64(three, 0, vlm * vlm * sum_w)
                store_f64(four, 0, vls * products)
                store_f64(five, 0, vlm * sum_x)
                for at in range(0, LANES, per_block):
                    a, b = group_sum(one, at, per_block), group_sum(two, at, per_block)
                    c, p = group_sum(three, at, per_block), group_sum(four, at, per_block)
                    r = group_sum(five, at, per_block)
                    determinant = a * c - b * b
                    regular = determinant > SINGULAR * (a * c)
                    inverted = inverse(determinant)
                    u1, m1 = (p * c - r * b) * inverted, (p * b - r * a) * inverted
                    alone = c == 0.0 or (regular and m1 < 0.0)
                    if alone:
                        u1, m1 = p * inverse(a), 0.0
                    if (regular or alone) and u1 > 0.0:
                        spread(unit, at, per_block, np.float64(stored(u1, F16)))
                        spread(least, at, per_block, np.float64(stored(m1, F16)))
        for lane in range(blocks):
            if lane % per_block == 0:
                d[(first + lane) // per_block] = np.float32(kept_unit[lane])
                dmin[(first + lane) // per_block] = np.float32(kept_least[lane])
            ls[first + lane], lm[first + lane] = np.uint8(kept_ls[lane]), np.uint8(kept_lm[lane])
            f, m = inverse(kept_unit[lane] * kept_ls[lane]), kept_least[lane] * kept_lm[lane]
            for i in range(size):
                codes[first + lane, i] = np.uint8(nearest_one((tx[i * LANES + lane] + m) * f, 0.0, top))


@kernel
def scaled_super_blocks(x, w, low, high, scale_low, scale_high, window, starts, units, d, ls, codes, lo, hi):
    """``search_k_scaled`` of super-blocks [lo, hi).

    Args:
        x: sub-blocks, float32 ``[16 * n, 16]``.
        w: like ``x``.
        low: the least code, a float.
        high: the largest, a float.
        scale_low: the least scale, a float.
        scale_high: the largest, a float.
        window: what is added to a scale to try it.
        starts: of sub-blocks.
        units: starts of the units.
        d: float32 ``[n]``, to be written, and so are the others.
        ls: scales, int16 ``[16 * n]``.
        codes: int8, like ``x``.
        lo: the first super-block.
        hi: after the last.
    """
    size = 16
    tx, tw = scratch(TILE, np.float64), scratch(TILE, np.float64)
    one, two, kept = scratch(LANES, np.float64), scratch(LANES, np.float64), scratch(LANES, np.float64)
    for block in range(lo, hi):
        first = block * LANES
        load_tile(x, w, first, LANES, size, tx, tw)
        scale = fit_scale(tx, tw, size, low, high, starts)
        factor, squares = inverses(scale), splat(0.0)
        for i in range(size):
            q = nearest(load_f64(tx, i * LANES) * factor, low, high)
            squares = squares + load_f64(tw, i * LANES) * q * q
        store_f64(one, 0, scale)
        store_f64(two, 0, squares)
        unit = np.float64(stored(fit_one_scale(one, two, 0, LANES, scale_low, scale_high, units), F16))
        vls = nearest(scale * inverse(unit), scale_low, scale_high)
        best, kept_unit = np.inf, unit
        for turn in range(ROUNDS):
            around, error = vls, splat(np.inf)
            for more in range(window.size):
                try_ls = clipped(around + window[more], scale_low, scale_high)
                step, found = try_ls * unit, splat(0.0)
                factor = inverses(step)
                for i in range(size):
                    v = load_f64(tx, i * LANES)
                    e = v - nearest(v * factor, low, high) * step
                    found = found + load_f64(tw, i * LANES) * e * e
                better = found < error
                error, vls = where(better, found, error), where(better, try_ls, vls)
            store_f64(one, 0, error)
            total = group_sum(one, 0, LANES)
            if turn == 0 or total < best:
                best, kept_unit = total if total == total else np.inf, unit
                store_f64(kept, 0, vls)
            if turn + 1 < ROUNDS:
                factor, squares, products = inverses(vls * unit), splat(0.0), splat(0.0)
                for i in range(size):
                    v, u = load_f64(tx, i * LANES), load_f64(tw, i * LANES)
                    q = nearest(v * factor, low, high)
                    squares = squares + u * q * q
                    products = products + u * v * q
                store_f64(one, 0, vls * vls * squares)
                store_f64(two, 0, vls * products)
                a, p = group_sum(one, 0, LANES), group_sum(two, 0, LANES)
                if a > 0.0:
                    unit = np.float64(stored(p * inverse(a), F16))
        d[block] = np.float32(kept_unit)
        for lane in range(LANES):
            ls[first + lane] = np.int16(kept[lane])
            f = inverse(kept_unit * kept[lane])
            for i in range(size):
                codes[first + lane, i] = np.int8(nearest_one(tx[i * LANES + lane] * f, low, high))
