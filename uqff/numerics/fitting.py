"""Codes and scales of least weighted squared error: the searches that all types share, in numpy.

A block is ``x ~ scale * code`` or ``x ~ scale * code + offset`` with whole codes in a range.  For given codes the best
scale and offset are a least-squares problem with a closed form; for a given scale and offset the best codes are the
nearest.  A search tries scales (and offsets) that lie around those which just hold the extremes of the block, takes the
codes nearest to each and asks what their least squares would explain; from the best (of scales with offsets: from some
of the best) it alternates between the two.
Then what is stored is rounded as the format stores it, neighbours of the rounded scale are tried as well, and the codes
are those nearest to what a reader will see.

Everything is float64, so no float32 block overflows or underflows, but for the choice among scales with offsets, whose
blocks are taken to a common range; sums run over the elements of a block in their order.  Arrays are ``[size, n]``:
elements run along the first axis, blocks along the last.
:mod:`uqff.simd.fitting` is the same in kernels, to the last bit.

The class of search is that of ggml's ``make_qx_quants`` and ``make_qkx2_quants``, with finer starts.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from uqff.numerics.packing import (
    bf16_to_float32,
    e4m3_to_float32,
    f16_to_float32,
    float32_to_bf16,
    float32_to_e4m3,
    float32_to_f16,
)

__all__ = [
    "BF16",
    "CANDIDATES",
    "E4M3",
    "F16",
    "F32",
    "NEIGHBOURS",
    "STEPS",
    "TURNS",
    "Narrow",
    "Single",
    "Wide",
    "affine_starts",
    "fit_affine",
    "fit_scale",
    "nearest_codes",
    "quantize_affine",
    "quantize_scaled",
    "scale_starts",
    "stored",
    "total",
]

Wide: TypeAlias = npt.NDArray[np.float64]
Narrow: TypeAlias = npt.NDArray[np.float32]
_Float = TypeVar("_Float", bound=np.floating[Any])

TURNS: Final = 4
"""How often a search for a scale alternates between codes and scales after its starts."""

CANDIDATES, STEPS = 4, 2
"""How many of the starts of scale and offset go on, and how often they alternate."""

F32, F16, BF16, E4M3 = 0, 1, 2, 3
"""How a scale is stored; ``E4M3``: 416 times itself, as F8Q8 does."""

UNITS: Final = (0.0, 2.0**-10, 2.0**-7, 2.0**-3)
"""By how much a neighbour of a stored scale differs from it, relatively, at most."""

NEIGHBOURS: Final = (0.0, -1.0, 1.0)
"""Which neighbours of a stored scale are tried, in units; of equally good ones the first counts."""

E4M3_UNIT: Final = np.float32(416)

SINGULAR: Final = 1e-12
"""Codes whose variance is below this part of their mean square are one code: they say nothing of a scale."""

SINGULAR_32: Final = np.float32(1e-6)
"""The same in float32."""


def scale_starts(low: int, widest: float, narrowest: float, count: int, signs: tuple[int, ...] = (1, -1)) -> Wide:
    """Codes that the largest magnitude of a block is put at to begin with: of both signs, evenly spaced.

    Args:
        low: the least code, whose magnitude is 1 in what follows.
        widest: the largest.
        narrowest: the least.
        count: of one sign.
        signs: which.
    """
    steps = [abs(low) * (narrowest + (widest - narrowest) * k / (count - 1)) for k in range(count)]
    return np.array([sign * step for sign in signs for step in steps])


def affine_starts(top: int, *, most: float, count: int, apart: int | None = None) -> Wide:
    """What is cut off a block's range to begin with, at either end, as parts of it: ``[n, 2]``.

    Args:
        top: the largest code; half a step beyond the extremes is the least.
        most: the largest part.
        count: of one end.
        apart: by how many steps the parts of both ends differ at most: of the rest hardly any is ever the best.
    """
    least = -0.5 / top if top > 1 else 0.0
    cuts = [least + (most - least) * k / (count - 1) for k in range(count)]
    most_apart = count if apart is None else apart
    return np.array([(a, b) for i, a in enumerate(cuts) for j, b in enumerate(cuts) if abs(i - j) <= most_apart])


def nearest_codes(v: Wide, low: float, high: float) -> Wide:
    """The nearest whole numbers from ``low`` to ``high``; of two equally near the even one, of NaN ``low``."""
    nearest: Wide = np.rint(np.fmin(np.fmax(v, low), high))
    return nearest


def total(terms: npt.NDArray[_Float]) -> npt.NDArray[_Float]:
    """The sum over the first axis, one element after the other, in their dtype."""
    made: npt.NDArray[_Float] = np.zeros_like(terms[0])
    for term in terms:
        made = made + term
    return made


def inverse(d: npt.NDArray[_Float]) -> npt.NDArray[_Float]:
    """1 / d, 0 where d is 0."""
    one = d.dtype.type(1)
    made: npt.NDArray[_Float] = np.where(d != 0, one / np.where(d != 0, d, one), d.dtype.type(0))
    return made


def stored(values: Wide, form: int) -> npt.NDArray[np.float32]:
    """Scales as a reader sees them: rounded to float32 and then as the form says."""
    with np.errstate(over="ignore"):
        single: npt.NDArray[np.float32] = values.astype(np.float32)
        if form == F16:
            return f16_to_float32(float32_to_f16(single))
        if form == BF16:
            return bf16_to_float32(float32_to_bf16(single))
        if form == E4M3:
            single = e4m3_to_float32(float32_to_e4m3(single * E4M3_UNIT)) / E4M3_UNIT
    return single


def fit_scale(x: Wide, w: Wide, low: float, high: float, starts: Wide) -> Wide:
    """The scale of ``x ~ scale * code``, before it is rounded; 0 where nothing is explained.

    Args:
        x: finite float64 ``[size, n]``.
        w: weights of the squared errors, not negative, like ``x``.
        low: the least code.
        high: the largest.
        starts: see :func:`scale_starts`.
    """
    peak, wx = inverse(np.abs(x).max(0)), w * x
    best, scale = np.zeros_like(peak), np.zeros_like(peak)
    for start in [*starts, *(None,) * TURNS]:
        q = nearest_codes(x * (inverse(scale) if start is None else start * peak), low, high)
        products, squares = total(wx * q), total(w * q * q)
        explained = products * products * inverse(squares)
        better = explained > best
        best = np.where(better, explained, best)
        scale = np.where(better, products * inverse(squares), scale)
    return scale


def fit_affine(x: Wide, w: Wide, top: float, starts: Wide, *, free: bool) -> tuple[Wide, Wide]:
    """Scale and offset of ``x ~ scale * code + offset``, codes from 0 to ``top``, before they are rounded.

    The starts are looked at in float32, of blocks whose numbers are taken to 0 to 1 and whose weights to 1 at most: the
    best of them take some steps each, and the best of these is solved for again in float64.

    Args:
        x: finite float64 ``[size, n]``.
        w: weights of the squared errors, not negative, like ``x``.
        top: the largest code.
        starts: see :func:`affine_starts`.
        free: whether the offset may be above zero.
    """
    least, most = x.min(0), x.max(0)
    if not free:
        least, most = np.minimum(least, 0.0), np.maximum(most, 0.0)
    span = most - least
    unit = inverse(span)
    block = Single((x - least) * unit, w * inverse(w.max(0)), -least * unit, top, free=free)
    errors, scales, offsets = (np.zeros((CANDIDATES, *span.shape), np.float32) for _ in range(3))
    errors[:] = np.inf
    for a, b in starts:
        error, s, z = block.step(np.float32(top / (1.0 - a - b)), np.float32(a))
        for k in range(CANDIDATES):
            better = error < errors[k]
            errors[k], error = np.where(better, error, errors[k]), np.where(better, errors[k], error)
            scales[k], s = np.where(better, s, scales[k]), np.where(better, scales[k], s)
            offsets[k], z = np.where(better, z, offsets[k]), np.where(better, offsets[k], z)
    best, scale32, offset32 = errors[0], scales[0], offsets[0]
    for k in range(CANDIDATES):
        s, z = scales[k], offsets[k]
        for _ in range(STEPS):
            error, s, z = block.step(inverse(s), z)
            better = error < best
            best = np.where(better, error, best)
            scale32, offset32 = np.where(better, s, scale32), np.where(better, z, offset32)
    wx = w * x
    sum_w, sum_x = total(w), total(wx)
    q = nearest_codes((x - (least + offset32 * span)) * inverse(scale32 * span), 0.0, top)
    wq = w * q
    codes, squares, products = total(wq), total(wq * q), total(wx * q)
    determinant = sum_w * squares - codes * codes
    regular = determinant > SINGULAR * (sum_w * squares)
    inverted = inverse(determinant)
    scale, offset = (sum_w * products - sum_x * codes) * inverted, (squares * sum_x - codes * products) * inverted
    flat = sum_x * inverse(sum_w)
    if not free:
        inside = regular & (offset <= 0)
        scale, offset = np.where(inside, scale, products * inverse(squares)), np.where(inside, offset, 0.0)
        regular = squares > 0
        flat = np.minimum(flat, 0.0)
    explained = scale * (2 * products - scale * squares - 2 * (offset * codes)) + offset * (2 * sum_x - offset * sum_w)
    better = regular & (scale > 0) & (explained > flat * (2 * sum_x - flat * sum_w))
    return np.where(better, scale, 0.0), np.where(better, offset, flat)


class Single:
    """Blocks in float32, for :func:`fit_affine` to compare starts by.

    Args:
        y: numbers from 0 to 1, ``[size, n]``.
        u: weights from 0 to 1, like ``y``.
        ceiling: what an offset may not be above, unless it is free, ``[n]``.
        top: the largest code.
        free: whether it is.
    """

    def __init__(self, y: Wide, u: Wide, ceiling: Wide, top: float, *, free: bool) -> None:
        self.y, self.u, self.ceiling = y.astype(np.float32), u.astype(np.float32), ceiling.astype(np.float32)
        self.top, self.free = np.float32(top), free
        self.sum_u = total(self.u)

    def step(self, factor: Narrow | np.float32, zero: Narrow | np.float32) -> tuple[Narrow, Narrow, Narrow]:
        """The best scale and offset for the codes that are nearest to ``(y - zero) * factor``, after their error.

        It is that of ``r ~ grow * code + shift`` for what is left of these numbers, ``r``, so that little cancels; and
        infinite where there is no scale above zero.
        """
        v = (self.y - zero) * factor
        q = np.rint(np.fmin(np.fmax(v, np.float32(0)), self.top))
        r = v - q
        ur, uq = self.u * r, self.u * q
        rests, codes = total(ur), total(uq)
        rests2, products, squares = total(ur * r), total(ur * q), total(uq * q)
        determinant = self.sum_u * squares - codes * codes
        regular = determinant > SINGULAR_32 * (self.sum_u * squares)
        inverted = inverse(determinant)
        grow = (self.sum_u * products - rests * codes) * inverted
        shift = (squares * rests - products * codes) * inverted
        if not self.free:
            most = (self.ceiling - zero) * factor
            inside = regular & (shift <= most)
            grow = np.where(inside, grow, (products - most * codes) * inverse(squares))
            shift = np.where(inside, shift, most)
            regular = squares > 0
        error = rests2 + grow * (grow * squares - 2 * products) + shift * (shift * self.sum_u - 2 * rests)
        error = error + 2 * (grow * shift) * codes
        one = inverse(np.asarray(factor))
        scale = (grow + np.float32(1)) * one
        error = np.where(regular & (scale > 0), error * one * one, np.float32(np.inf))
        return error, scale, zero + shift * one


def quantize_scaled(
    x: Wide, w: Wide, low: float, high: float, starts: Wide, form: int
) -> tuple[npt.NDArray[np.float32], Wide]:
    """Scales as they are stored, float32 ``[n]``, and the codes nearest to them, ``[size, n]``."""
    scale = fit_scale(x, w, low, high, starts)
    best, chosen = np.full(scale.shape, np.inf), stored(scale, form)
    for neighbour in NEIGHBOURS if UNITS[form] else NEIGHBOURS[:1]:
        candidate = stored(scale * (1 + neighbour * UNITS[form]), form)
        d = candidate.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = x - nearest_codes(x * inverse(d), low, high) * d
            error = total(w * error * error)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, candidate, chosen)
    return chosen, nearest_codes(x * inverse(chosen.astype(np.float64)), low, high)


def quantize_affine(
    x: Wide, w: Wide, top: float, starts: Wide, form: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Wide]:
    """Scales and offsets as they are stored, float32 ``[n]``, and the codes nearest to them, ``[size, n]``."""
    scale, offset = fit_affine(x, w, top, starts, free=True)
    sum_w, sum_x = total(w), total(w * x)
    best = np.full(scale.shape, np.inf)
    chosen, zero = stored(scale, form), stored(offset, form)
    for neighbour in NEIGHBOURS if UNITS[form] else NEIGHBOURS[:1]:
        candidate = stored(scale * (1 + neighbour * UNITS[form]), form)
        s = candidate.astype(np.float64)
        with np.errstate(invalid="ignore"):
            q = nearest_codes((x - offset) * inverse(s), 0.0, top)
            rounded = stored((sum_x - s * total(w * q)) * inverse(sum_w), form)
            b = rounded.astype(np.float64)
            error = x - (nearest_codes((x - b) * inverse(s), 0.0, top) * s + b)
            error = total(w * error * error)
        better = error < best
        best = np.where(better, error, best)
        chosen, zero = np.where(better, candidate, chosen), np.where(better, rounded, zero)
    s, b = chosen.astype(np.float64), zero.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return chosen, zero, nearest_codes((x - b) * inverse(s), 0.0, top)
