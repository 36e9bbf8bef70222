"""Codes and scales of least weighted squared error: the searches that all types share, in numpy.

A block is ``x ~ scale * code`` or ``x ~ scale * code + offset`` with whole codes in a range.  For given codes the best
scale and offset are a least-squares problem with a closed form; for a given scale and offset the best codes are the
nearest.  A search tries scales (and offsets) that lie around those which just hold the extremes of the block, takes the
codes nearest to each and asks what their least squares would explain; from the best it alternates between the two.
Then what is stored is rounded as the format stores it, neighbours of the rounded scale are tried as well, and the codes
are those nearest to what a reader will see.

Everything is float64, so no float32 block overflows or underflows; sums run over the elements of a block in their
order.  Arrays are ``[size, n]``: elements run along the first axis, blocks along the last.
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
    "E4M3",
    "F16",
    "F32",
    "NEIGHBOURS",
    "TURNS",
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
_Float = TypeVar("_Float", bound=np.floating[Any])

TURNS: Final = 4
"""How often a search alternates between codes and scales after its starts."""

F32, F16, BF16, E4M3 = 0, 1, 2, 3
"""How a scale is stored; ``E4M3``: 416 times itself, as F8Q8 does."""

UNITS: Final = (0.0, 2.0**-10, 2.0**-7, 2.0**-3)
"""By how much a neighbour of a stored scale differs from it, relatively, at most."""

NEIGHBOURS: Final = (0.0, -1.0, 1.0)
"""Which neighbours of a stored scale are tried, in units; of equally good ones the first counts."""

E4M3_UNIT: Final = np.float32(416)

SINGULAR: Final = 1e-12
"""Codes whose variance is below this part of their mean square are one code: they say nothing of a scale."""


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


def affine_starts(top: int, *, most: float, count: int) -> Wide:
    """What is cut off a block's range to begin with, at either end, as parts of it: ``[count * count, 2]``.

    Args:
        top: the largest code; half a step beyond the extremes is the least.
        most: the largest part.
        count: of one end.
    """
    least = -0.5 / top if top > 1 else 0.0
    cuts = [least + (most - least) * k / (count - 1) for k in range(count)]
    return np.array([(a, b) for a in cuts for b in cuts])


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


def inverse(d: Wide) -> Wide:
    """1 / d, 0 where d is 0."""
    made: Wide = np.where(d != 0, 1 / np.where(d != 0, d, 1), 0.0)
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
    span, wx = most - least, w * x
    sum_w, sum_x = total(w), total(wx)
    scale, offset = np.zeros_like(span), sum_x * inverse(sum_w)
    if not free:
        offset = np.minimum(offset, 0.0)
    best = offset * (2 * sum_x - offset * sum_w)
    for start in [*starts, *(None,) * TURNS]:
        if start is None:
            factor, zero = inverse(scale), offset
        else:
            factor, zero = top * inverse(span * (1.0 - start[0] - start[1])), least + start[0] * span
        q = nearest_codes((x - zero) * factor, 0.0, top)
        wq = w * q
        codes, squares, products = total(wq), total(wq * q), total(wx * q)
        determinant = sum_w * squares - codes * codes
        regular = determinant > SINGULAR * (sum_w * squares)
        inverted = inverse(determinant)
        s, b = (sum_w * products - sum_x * codes) * inverted, (squares * sum_x - codes * products) * inverted
        if not free:
            inside = regular & (b <= 0)
            s, b = np.where(inside, s, products * inverse(squares)), np.where(inside, b, 0.0)
            regular = squares > 0
        explained = s * (2 * products - s * squares - 2 * (b * codes)) + b * (2 * sum_x - b * sum_w)
        better = regular & (s > 0) & (explained > best)
        best = np.where(better, explained, best)
        scale, offset = np.where(better, s, scale), np.where(better, b, offset)
    return scale, offset


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
