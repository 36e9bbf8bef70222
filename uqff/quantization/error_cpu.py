"""The sums of :mod:`uqff.quantization.error` in one pass over two weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from uqff.simd.bits import float_of
from uqff.simd.compiling import kernel
from uqff.simd.load_store import load_f32, store_f64, store_i32
from uqff.simd.scratch import scratch, scratch_rows
from uqff.simd.vectors import LANES, as_i32, splat, where_less, wide

__all__ = ["pair_sums"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def pair_sums(a: F32, b: F32) -> F64:
    """See :func:`uqff.quantization.error.pair_sums`."""
    result = np.empty(5, np.float64)
    a, b = a.view(), b.view()
    # One compiled version serves read-only and writeable sources: numba tells them apart.
    a.flags.writeable = b.flags.writeable = False
    _pair_sums(a, b, result)
    return result


@kernel
def _pair_sums(a: Any, b: Any, result: Any) -> None:
    none = wide(splat(np.float32(0)))
    squares_a, squares_b, products, squares = none, none, none, none
    most = splat(0)
    whole = a.size // LANES * LANES
    for at in range(0, whole, LANES):
        x, y = load_f32(a, at), load_f32(b, at)
        magnitude = as_i32(y - x) & 0x7FFFFFFF
        most = where_less(most, magnitude, magnitude, most)
        u, v, w = wide(x), wide(y), wide(y - x)
        squares_a = squares_a + u * u
        squares_b = squares_b + v * v
        products = products + u * v
        squares = squares + w * w
    lanes = scratch_rows(4, LANES, np.float64)
    flat = lanes.reshape(-1)
    store_f64(flat, 0, squares_a)
    store_f64(flat, LANES, squares_b)
    store_f64(flat, 2 * LANES, products)
    store_f64(flat, 3 * LANES, squares)
    peaks = scratch(LANES, np.int32)
    store_i32(peaks, 0, most)
    for k in range(a.size - whole):
        x, y = a[whole + k], b[whole + k]
        difference = np.float32(y - x)
        lanes[0, k] += np.float64(x) * np.float64(x)
        lanes[1, k] += np.float64(y) * np.float64(y)
        lanes[2, k] += np.float64(x) * np.float64(y)
        lanes[3, k] += np.float64(difference) * np.float64(difference)
        peaks[k] = max(peaks[k], np.int32(difference.view(np.int32) & np.int32(0x7FFFFFFF)))
    largest = peaks[0]
    for k in range(LANES):
        largest = max(largest, peaks[k])
    for i in range(4):
        total = lanes[i, 0]
        for k in range(1, LANES):
            total += lanes[i, k]
        result[i] = total
    result[4] = np.float64(float_of(np.uint32(largest)))
