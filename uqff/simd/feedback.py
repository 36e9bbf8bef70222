"""Error feedback within a block of inputs, equal to :func:`uqff.numerics.feedback.round_inputs` to the last bit.

Rows are independent of each other: :data:`~uqff.simd.vectors.LANES` of them are rounded together, the rest one by one.
What earlier inputs leave is subtracted when an input's turn comes, in their order.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, Final

import numpy as np

from uqff.numerics.feedback import U8
from uqff.numerics.fitting import Wide
from uqff.simd.compiling import inline, kernel
from uqff.simd.fitting import MOST, inverses
from uqff.simd.load_store import load_f64, store_f64
from uqff.simd.masks import where
from uqff.simd.scratch import scratch
from uqff.simd.threads import run_ranges
from uqff.simd.vectors import LANES, splat

__all__ = ["round_inputs"]

GRAIN: Final = 64
"""Rows of a range at least."""
FEW = 32
"""So many values are all compared with; more are searched through."""

_TILE = MOST * LANES
_SHIFT = 1.5 * 2.0**52


def round_inputs(
    x: Wide, factor: Wide, offset: Wide, step: Wide, values: Wide, codes: U8, near: Wide, errors: Wide, loss: Wide
) -> None:
    """See :func:`uqff.numerics.feedback.round_inputs`; all arrays but ``factor`` must be C-contiguous."""
    columns = np.ascontiguousarray(factor.T)
    middles = (values[1:] + values[:-1]) / 2
    even = bool((values == values[0] + np.arange(len(values))).all())
    one: Any = round_row
    many: Any = round_lanes
    flat = [each.reshape(-1) for each in (x, offset, step, codes, near, errors)]

    def work(lo: int, hi: int) -> None:
        whole = lo if len(x) > MOST else lo + (hi - lo) // LANES * LANES
        many(*flat, columns, values, middles, even, loss, lo, whole)
        for row in range(whole, hi):
            one(x, offset, step, codes, near, errors, columns, values, middles, loss, row)

    run_ranges(work, x.shape[1], grain=GRAIN)


@inline
def search(v, middles):
    """How many of the middles are below a number, all if it is none."""
    low, high = 0, len(middles)
    while low < high:
        middle = (low + high) // 2
        if v <= middles[middle]:
            high = middle
        else:
            low = middle + 1
    return low


@kernel
def round_row(x, offset, step, codes, near, errors, columns, values, middles, loss, row):
    """One row."""
    lost = 0.0
    for j in range(x.shape[0]):
        v, s, b = x[j, row], step[j, row], offset[j, row]
        for i in range(j):
            v = v - errors[i, row] * columns[j, i]
        x[j, row] = v
        low = search((v - b) * (1.0 / s if s != 0.0 else 0.0), middles)
        codes[j, row] = low
        near[j, row] = b + s * values[low]
        e = (v - near[j, row]) * (1.0 / columns[j, j])
        errors[j, row] = e
        lost += e * e
    loss[row] = lost


@kernel
def round_lanes(x, offset, step, codes, near, errors, columns, values, middles, even, loss, lo, hi):
    """Rows [lo, hi), in multiples of LANES, of at most MOST inputs; arrays are flat."""
    n, last = columns.shape[0], len(values) - 1
    rows = x.size // n
    tile, found, left = scratch(LANES, np.float64), scratch(LANES, np.float64), scratch(_TILE, np.float64)
    least, top = splat(values[0]), splat(np.float64(last))
    none, one = splat(0.0), splat(1.0)
    for first in range(lo, hi, LANES):
        lost = splat(0.0)
        for j in range(n):
            at = j * rows + first
            v = load_f64(x, at)
            for i in range(j):
                v = v - load_f64(left, i * LANES) * columns[j, i]
            store_f64(x, at, v)
            s, b = load_f64(step, at), load_f64(offset, at)
            u = (v - b) * inverses(s)
            if even:
                k = u - least
                k = where(k < top, k, top)
                k = where(k > none, k, none)
                k = (k + _SHIFT) - _SHIFT
                middle = k + (values[0] + 0.5)
                k = where((u > middle) & (k < top), k + 1.0, k)
                k = where((u <= middle - 1.0) & (k > none), k - one, k)
                q = k + values[0]
                store_f64(found, 0, k)
            elif last < FEW:
                q, k = least, splat(0.0)
                for m in range(last):
                    below = u <= middles[m]
                    q = where(below, q, splat(values[m + 1]))
                    k = where(below, k, splat(m + 1.0))
                store_f64(found, 0, k)
            else:
                store_f64(tile, 0, u)
                for lane in range(LANES):
                    low = search(tile[lane], middles)
                    found[lane] = low
                    tile[lane] = values[low]
                q = load_f64(tile, 0)
            for lane in range(LANES):
                codes[at + lane] = np.uint8(found[lane])
            q = b + s * q
            store_f64(near, at, q)
            e = (v - q) * (1.0 / columns[j, j])
            store_f64(errors, at, e)
            store_f64(left, j * LANES, e)
            lost = lost + e * e
        store_f64(loss, first, lost)
