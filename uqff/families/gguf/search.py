"""What the ggml quantisers compute: the engine's scalar arithmetic, and its searches for the scale of a sub-block.

All functions vectorise over the last axis (blocks or sub-blocks); the first runs over the elements, in their order.

Authority: candle-core ``src/quantized/utils.rs``, 0.10.2. The edges of its arithmetic are told in
``uqff.families.gguf.reference_quantize``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

F32: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]

TRIES = 5
"""Turns of every search but the rescaling of Q6K."""

RESCALE_TRIES = 3

WEIGHTED_STEPS = 36
"""Scales that the weighted search for scale and minimum tries besides the first."""

# ---------------------------------------------------------------------------------------------------------------------
# Searches over one sub-block
# ---------------------------------------------------------------------------------------------------------------------


def search_scale_and_min(x: F32, nmax: int) -> tuple[F32, F32]:
    """Candle's ``make_qkx1_quants``: x ~ scale * code - minimum with codes 0..nmax, by alternating between the two.

    A sub-block of one value has scale 0 and minimum 0, whatever the value.
    """
    low, high = x.min(axis=0), x.max(axis=0)
    flat = low == high
    low = np.minimum(low, np.float32(0))
    iscale = np.float32(nmax) / (high - low)
    scale = np.zeros_like(low)
    codes = np.zeros(x.shape, np.float32)
    searching = ~flat
    for _ in range(TRIES):
        shifted = x - low
        new_codes = np.clip(nearest_int(iscale * shifted), 0, nmax).astype(np.float32)
        changed = (new_codes != codes).any(axis=0)
        sumlx = _sum(shifted * new_codes)
        suml2 = _sum(new_codes * new_codes)
        new_scale = sumlx / suml2
        new_low = _sum(x - new_scale * new_codes) / np.float32(len(x))
        new_low = np.where(new_low > 0, np.float32(0), new_low)
        codes = np.where(searching, new_codes, codes)
        scale = np.where(searching, new_scale, scale)
        low = np.where(searching, new_low, low)
        iscale = np.float32(1) / scale
        searching &= changed
    return scale, np.where(flat, np.float32(0), -low)


def search_q3_scale(x: F32) -> F32:
    """Candle's ``make_q3_quants``: the scale of x ~ scale * code, codes -4..3, weights x * x; 0 if x is zero."""
    largest = largest_magnitude(x)
    w = x * x
    codes = np.clip(nearest_int(np.float32(-4) / largest * x), -4, 3).astype(np.float32)
    sumlx = _sum(w * x * codes)
    suml2 = _sum(_w_times_square(w, codes))
    _, sumlx, suml2 = _descend(x, w, codes, sumlx, suml2, 4, _w_times_square)
    return np.where(largest == 0, np.float32(0), sumlx / suml2)


def search_q6_scale(x: F32) -> tuple[F32, I32]:
    """Candle's ``make_qx_quants``, nmax 32, rmse_type 1: scale, and codes + 32, of x ~ scale * code, codes -32..31.

    All zero: scale 0, and 0 in place of the codes + 32.
    """
    return search_weighted_scale(x, x * x, 32)


def search_weighted_scale(x: F32, w: F32, nmax: int) -> tuple[F32, I32]:
    """Candle's ``make_qx_quants``, rmse_type 1: scale, and codes + nmax, of x ~ scale * code, codes -nmax..nmax - 1.

    All zero: scale 0, and 0 in place of the codes + nmax.
    """
    largest = largest_magnitude(x)
    codes = np.clip(nearest_int(np.float32(-nmax) / largest * x), -nmax, nmax - 1).astype(np.float32)
    sumlx = _sum(w * x * codes)
    suml2 = _sum(_w_times_code_times_code(w, codes))
    for _ in range(RESCALE_TRIES):
        scale = sumlx / suml2
        best = scale * sumlx
        new_codes = np.clip(nearest_int(np.float32(1) / scale * x), -nmax, nmax - 1).astype(np.float32)
        slx = _sum(w * x * new_codes)
        sl2 = _sum(_w_times_code_times_code(w, new_codes))
        # A sub-block that fails to improve stays as it is, so its next tries fail as well: no need to remember it.
        kept = (new_codes == codes).all(axis=0) | (sl2 == 0) | (slx * slx <= best * sl2)
        codes = np.where(kept, codes, new_codes)
        sumlx = np.where(kept, sumlx, slx)
        suml2 = np.where(kept, suml2, sl2)
    codes, sumlx, suml2 = _descend(x, w, codes, sumlx, suml2, nmax, _w_times_code_times_code)
    zero = largest == 0
    return np.where(zero, np.float32(0), sumlx / suml2), np.where(zero, 0, codes.astype(np.int32) + nmax)


def search_weighted_scale_and_min(x: F32, w: F32, nmax: int) -> tuple[F32, F32]:
    """Candle's ``make_qkx3_quants``: x ~ scale * code - minimum with codes 0..nmax; 37 scales are tried."""
    low, high = x[0], x[0]
    for value in x[1:]:
        low, high = np.where(value < low, value, low), np.where(value > high, value, high)
    sum_w, sum_x = _sum(w), _sum(w * x)
    low = np.where(low > 0, np.float32(0), low)
    flat = high <= low
    span, start = high - low, low
    scale: F32 = np.float32(1) / (np.float32(nmax) / span)
    codes = np.clip(nearest_int(np.float32(nmax) / span * (x - start)), 0, nmax).astype(np.float32)
    difference: F32 = scale * codes + low - x
    best = _sum(w * (difference * difference))
    for step in range(WEIGHTED_STEPS + 1):
        # The minimum found last is what the next scales start from.
        iscale = (np.float32(-0.9) + np.float32(0.05) * np.float32(step) + np.float32(nmax)) / (high - low)
        codes = np.clip(nearest_int(iscale * (x - low)), 0, nmax).astype(np.float32)
        sum_l, sum_l2, sum_xl = _sum(w * codes), _sum(w * (codes * codes)), _sum(w * codes * x)
        d = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / d
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / d
        above = this_low > 0
        this_low = np.where(above, np.float32(0), this_low)
        this_scale = np.where(above, sum_xl / sum_l2, this_scale)
        found = (this_scale * codes + this_low - x).astype(np.float32, copy=False)
        error = _sum(w * (found * found))
        better = (d > 0) & (error < best)
        best = np.where(better, error, best)
        scale, low = np.where(better, this_scale, scale), np.where(better, this_low, low)
    return np.where(flat, np.float32(0), scale), np.where(flat, -start, -low)


def search_positive_scale(x: F32, w: F32, nmax: int) -> tuple[F32, I32]:
    """Candle's ``make_qp_quants``: scale and codes of x ~ scale * code, codes 0..nmax, x not below 0."""
    largest = at_least_zero_maximum(x)
    zero = largest == 0

    def codes_at(iscale: F32) -> F32:
        codes: F32 = np.minimum(nearest_int(iscale * x) & 0xFF, nmax).astype(np.float32)
        return codes

    def error(iscale: F32, codes: F32) -> F32:
        difference = x - np.float32(1) / iscale * codes
        return _sum(w * difference * difference)

    iscale = np.float32(nmax) / largest
    best = error(iscale, (nearest_int(iscale * x) & 0xFF).astype(np.float32))
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = (np.float32(0.1) * np.float32(step) + np.float32(nmax)) / largest
        found = error(tried, codes_at(tried))
        better = found < best
        best, iscale = np.where(better, found, best), np.where(better, tried, iscale)
    codes = np.minimum(saturate(round_half_away(iscale * x), 0, 255), nmax).astype(np.float32)
    sumlx, suml2 = _sum(w * x * codes), _sum(w * (codes * codes))
    for _ in range(TRIES):
        changed = False
        for i in range(len(x)):
            slx, sl2 = sumlx - w[i] * x[i] * codes[i], suml2 - w[i] * (codes[i] * codes[i])
            entered = (slx > 0) & (sl2 > 0)
            new = np.minimum(nearest_int(x[i] * sl2 / slx) & 0xFF, nmax).astype(np.float32)
            slx, sl2 = slx + w[i] * x[i] * new, sl2 + w[i] * (new * new)
            better = entered & (new != codes[i]) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            codes[i] = np.where(better, new, codes[i])
            sumlx, suml2 = np.where(better, slx, sumlx), np.where(better, sl2, suml2)
            changed = changed or bool(better.any())
        if not changed:
            break
    return np.where(zero, np.float32(0), sumlx / suml2), np.where(zero, 0, codes.astype(np.int32))


def _descend(
    x: F32, w: F32, codes: F32, sumlx: F32, suml2: F32, nmax: int, weighted_square: Callable[[F32, F32], F32]
) -> tuple[F32, F32, F32]:
    """Coordinate descent: one element's code at a time is set to its best value given all others.

    ``sumlx`` is the sum of w * x * code, ``suml2`` that of w * code * code; the error falls as sumlx^2 / suml2 rises.
    A sub-block with a negative ``sumlx`` less the element's own term is never entered: the engine looks at it only
    when positive.
    """
    codes = codes.copy()
    for _ in range(TRIES):
        changed = False
        for i in range(len(x)):
            slx = sumlx - w[i] * x[i] * codes[i]
            sl2 = suml2 - weighted_square(w[i], codes[i])
            entered = slx > 0
            new_code = np.clip(nearest_int(x[i] * sl2 / slx), -nmax, nmax - 1).astype(np.float32)
            slx = slx + w[i] * x[i] * new_code
            sl2 = sl2 + weighted_square(w[i], new_code)
            better = entered & (new_code != codes[i]) & (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            codes[i] = np.where(better, new_code, codes[i])
            sumlx = np.where(better, slx, sumlx)
            suml2 = np.where(better, sl2, suml2)
            changed = changed or bool(better.any())
        if not changed:
            break
    return codes, sumlx, suml2


def _w_times_square(w: F32, code: F32) -> F32:
    """The Q3K order of the product."""
    return w * (code * code)


def _w_times_code_times_code(w: F32, code: F32) -> F32:
    """The Q6K order of the product."""
    return w * code * code


# ---------------------------------------------------------------------------------------------------------------------
# The engine's arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def round_half_away(v: F32) -> F32:
    """Half away from zero, as Rust ``f32::round``. ``v - trunc(v)`` is exact, so no tie is missed and none invented."""
    whole = np.trunc(v)
    return np.where(np.abs(v - whole) >= 0.5, whole + np.copysign(np.float32(1), v), whole)


def saturate(v: F32, low: int, high: int) -> I32:
    """Rust ``v as i8`` and the like: truncate, saturate, NaN is 0. In f64, which holds every bound exactly."""
    return np.where(np.isnan(v), 0, np.clip(np.trunc(v.astype(np.float64)), low, high)).astype(np.int32)


def nearest_int(v: F32) -> I32:
    """Candle's ``nearest_int``: ``v.round() as i32``."""
    return saturate(round_half_away(v), -(2**31), 2**31 - 1)


def inverse(d: F32) -> F32:
    return np.asarray(np.where(d != 0, np.float32(1) / d, np.float32(0)))


def _sum(terms: F32) -> F32:
    """Over the first axis, one element after the other."""
    total: F32 = np.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def largest_magnitude(values: F32) -> F32:
    """The value of largest magnitude along the first axis, with its sign; the first of equals; NaN never; else 0.0."""
    largest: F32 = np.zeros_like(values[0])
    for value in values:
        largest = np.where(np.abs(value) > np.abs(largest), value, largest)
    return largest


def minimum(values: F32) -> F32:
    least: F32 = values[0]
    for value in values[1:]:
        least = np.where(value <= least, value, least)
    return least


def maximum(values: F32) -> F32:
    return -minimum(-values)


def at_least_zero_maximum(values: F32) -> F32:
    """The maximum along the first axis and 0.0; NaN never."""
    largest: F32 = np.zeros_like(values[0])
    for value in values:
        largest = np.where(value >= largest, value, largest)
    return largest


def widened_f16(d: F32) -> F32:
    """The value a reader of the stored f16 sees."""
    return d.astype(np.float16).astype(np.float32)
