"""Whether floats are finite, by their bits: one pass, no temporary."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from uqff.simd.compiling import kernel
from uqff.simd.threads import run_ranges

__all__ = ["largest_magnitude"]

GRAIN = 1 << 18
"""Elements of a run."""


def largest_magnitude(bits: npt.NDArray[np.uint16] | npt.NDArray[np.uint32], threads: int | None = None) -> int:
    """The largest bit pattern without its sign bit: magnitudes order like their bits, infinity above all numbers, NaN
    above infinity.

    Args:
        bits: uint16 or uint32 ``[n]``, contiguous: the bits of float16, bfloat16 or float32.
        threads: at most so many.
    """
    # One compiled version serves read-only and writeable sources: numba tells them apart.
    source = bits.view()
    source.flags.writeable = False
    peaks = np.zeros(-(-bits.size // GRAIN), bits.dtype)
    run_ranges(lambda lo, hi: peak_magnitudes(source, peaks, GRAIN, lo, hi), len(peaks), threads=threads)
    return int(peaks.max(initial=0))


@kernel
def peak_magnitudes(bits: Any, peaks: Any, run: int, lo: int, hi: int) -> None:
    """The largest magnitude of each run of ``run`` elements, for runs [lo, hi)."""
    magnitude = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    for r in range(lo, hi):
        elements = bits[r * run : min((r + 1) * run, bits.size)]
        peak = bits.dtype.type(0)
        for i in range(elements.size):
            peak = max(peak, elements[i] & magnitude)
        peaks[r] = peak
