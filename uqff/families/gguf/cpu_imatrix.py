"""The searches of K types with an importance matrix as kernels, equal to those of ``families.gguf.search`` bit for bit.

A sub-block after the other, in the engine's scalar order.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from uqff.families.gguf import assemble
from uqff.families.gguf.reference_imatrix import WITH_MIN, weights_of
from uqff.families.gguf.reference_quantize import QK_K, codes_with_min
from uqff.families.gguf.search import TRIES, WEIGHTED_STEPS
from uqff.simd.arithmetic import ONE, ZERO, nearest_int, unsigned_code
from uqff.simd.compiling import inline, kernel

__all__ = ["QUANTIZERS"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

_FIRST = np.float32(-0.9)
_STEP = np.float32(0.05)
_TENTH = np.float32(0.1)


@kernel
def scales_and_minimums(x, w, top, scales, minimums, lo, hi):
    """``search_weighted_scale_and_min`` of sub-blocks [lo, hi): float32 ``[n, size]``."""
    size = x.shape[1]
    for at in range(lo, hi):
        low, high = x[at, 0], x[at, 0]
        sum_w, sum_x = ZERO, ZERO
        for i in range(size):
            v = x[at, i]
            low, high = v if v < low else low, v if v > high else high
            sum_w += w[at, i]
            sum_x += w[at, i] * v
        low = ZERO if low > ZERO else low
        if high <= low:
            scales[at], minimums[at] = ZERO, -low
            continue
        iscale = top / (high - low)
        scale, best = ONE / iscale, ZERO
        for i in range(size):
            difference = scale * unsigned_code(iscale * (x[at, i] - low), top) + low - x[at, i]
            best += w[at, i] * (difference * difference)
        for step in range(WEIGHTED_STEPS + 1):
            iscale = (_FIRST + _STEP * np.float32(step) + top) / (high - low)
            sum_l, sum_l2, sum_xl = ZERO, ZERO, ZERO
            for i in range(size):
                code = unsigned_code(iscale * (x[at, i] - low), top)
                sum_l += w[at, i] * code
                sum_l2 += w[at, i] * (code * code)
                sum_xl += w[at, i] * code * x[at, i]
            d = sum_w * sum_l2 - sum_l * sum_l
            if d > ZERO:
                this_scale, this_low = (sum_w * sum_xl - sum_x * sum_l) / d, (sum_l2 * sum_x - sum_l * sum_xl) / d
                if this_low > ZERO:
                    this_scale, this_low = sum_xl / sum_l2, ZERO
                error = ZERO
                for i in range(size):
                    code = unsigned_code(iscale * (x[at, i] - low), top)
                    difference = this_scale * code + this_low - x[at, i]
                    error += w[at, i] * (difference * difference)
                if error < best:
                    best, scale, low = error, this_scale, this_low
        scales[at], minimums[at] = scale, -low


@inline
def _byte(v, top):
    """``nearest_int(v) as u8``, at most ``top``, as a float."""
    return min(np.float32(nearest_int(v) & 0xFF), top)


@kernel
def positive_scales(x, w, top, units, codes, lo, hi):
    """``search_positive_scale`` of super-blocks [lo, hi): float32 ``[n, count]``, codes uint8."""
    count = x.shape[1]
    for at in range(lo, hi):
        largest = ZERO
        for i in range(count):
            largest = x[at, i] if x[at, i] >= largest else largest
        if largest == ZERO:
            units[at] = ZERO
            codes[at, :] = 0
            continue
        iscale = top / largest
        unit, best = ONE / iscale, ZERO
        for i in range(count):
            difference = x[at, i] - unit * _byte(iscale * x[at, i], np.float32(255))
            best += w[at, i] * difference * difference
        for step in range(-4, 5):
            if step != 0:
                tried = (_TENTH * np.float32(step) + top) / largest
                unit, error = ONE / tried, ZERO
                for i in range(count):
                    difference = x[at, i] - unit * _byte(tried * x[at, i], top)
                    error += w[at, i] * difference * difference
                if error < best:
                    best, iscale = error, tried
        sumlx, suml2 = ZERO, ZERO
        for i in range(count):
            code = unsigned_code(iscale * x[at, i], top)
            codes[at, i] = np.uint8(np.int32(code))
            sumlx += w[at, i] * x[at, i] * code
            suml2 += w[at, i] * (code * code)
        for _ in range(TRIES):
            changed = False
            for i in range(count):
                code = np.float32(codes[at, i])
                slx, sl2 = sumlx - w[at, i] * x[at, i] * code, suml2 - w[at, i] * (code * code)
                if slx > ZERO and sl2 > ZERO:
                    new = _byte(x[at, i] * sl2 / slx, top)
                    if new != code:
                        slx += w[at, i] * x[at, i] * new
                        sl2 += w[at, i] * (new * new)
                        if slx * slx * suml2 > sumlx * sumlx * sl2:
                            codes[at, i] = np.uint8(np.int32(new))
                            sumlx, suml2 = slx, sl2
                            changed = True
            if not changed:
                break
        units[at] = sumlx / suml2


def _with_min(
    x: F32, importance: F32, size: int, nmax: int, limit: int, factor: np.float32
) -> tuple[F32, F32, I32, I32, I32]:
    """As in :mod:`uqff.families.gguf.reference_imatrix`."""
    per_block = QK_K // size
    weights, sums = weights_of(x, importance, size, factor)
    given, by_block = np.ascontiguousarray(weights.T), np.ascontiguousarray(sums.T)
    sub_blocks = np.ascontiguousarray(x).reshape(-1, size)
    scale, minimum = np.empty((2, len(sub_blocks)), np.float32)
    scales_and_minimums(sub_blocks, given, np.float32(nmax), scale, minimum, 0, len(sub_blocks))
    d, dmin = np.empty((2, len(x)), np.float32)
    ls, lm = np.empty((2, len(x), per_block), np.uint8)
    for values, unit, multiples in ((scale, d, ls), (minimum, dmin, lm)):
        positive_scales(values.reshape(-1, per_block), by_block, np.float32(limit), unit, multiples, 0, len(x))
    scales, minimums = (each.T.astype(np.int32) for each in (ls, lm))
    elements = assemble.sub_blocks(x, size)
    return d, dmin, scales, minimums, codes_with_min(elements, d, scales, dmin, minimums, nmax)


def _quantize(name: str, x: F32, importance: F32) -> U8:
    with np.errstate(all="ignore"):
        made: U8 = getattr(assemble, name.lower())(*_with_min(x, importance, *WITH_MIN[name]))
        return made


QUANTIZERS = {name: partial(_quantize, name) for name in WITH_MIN}
"""Of the types whose search has a kernel; Q3K and Q6K, which try few scales, have none."""
